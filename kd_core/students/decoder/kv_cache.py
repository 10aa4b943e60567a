"""Keys and values of earlier positions, so that a pass over new tokens does not compute the old ones again.

Slot p of a row holds the key and the value of its position p, whatever the positions of other rows. A slot behind a
row's last token may hold those of padding. No query reads it before the token that belongs there has overwritten it.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd_core.compiling import outside_compiled_graphs
from kd_core.students.decoder.masked_attention import attend_masked


@dataclass
class LayerCache:
    """Slots of one layer, [B, H_kv, slots, d] each, and the positions of the pass that is under way."""

    slots: int
    positions: Int[Tensor, "B T"] | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    @outside_compiled_graphs
    def attend(  # noqa: PLR0913 (those of `attention.attend`)
        self,
        q: Float[Tensor, "B H T d"],
        k: Tensor,
        v: Tensor,
        scale: float | None,
        window: int | None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Float[Tensor, "B H T d"]:
        """Stores the pass's keys and values, and returns attention to all positions up to that of each query."""
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], self.slots, k.shape[3])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        assert self.positions is not None
        # Write to the slots of the positions.  [B, H_kv, T, d]
        slots = self.positions[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, slots, k)
        self.values.scatter_(2, slots, v)
        # Band mask: query − window < slot ≤ query.  [B, 1, T, slots]
        query = self.positions[:, None, :, None]
        slot = torch.arange(self.slots, device=q.device)
        band = slot <= query
        if window is not None:
            band &= slot > query - window
        return attend_masked(q, self.keys, self.values, band, scale, soft_cap, sinks)


@dataclass
class KeyValueCache:
    """The caches of all layers, of rows that may grow to so many `slots`."""

    layers: int
    slots: int
    by_layer: list[LayerCache] = field(init=False)

    def __post_init__(self) -> None:
        self.by_layer = [LayerCache(self.slots) for _ in range(self.layers)]

    def begin_pass(self, positions: Int[Tensor, "B T"]) -> None:
        """Sets the positions of the tokens of the next pass."""
        for layer in self.by_layer:
            layer.positions = positions
