"""Importance of a decoder's widths, measured on text by activations alone (Minitron, arXiv 2407.14679).

    hidden channels         |outputs| of the norms on the residual stream, averaged over these norms
    feed-forward channels   |inputs| of down_proj, in each layer
    query heads             L2 norms of the heads' outputs, which are the inputs of o_proj, in each layer

Means over the positions of a row, then root mean squares over rows, which the paper found best. No sum depends on how
rows are batched.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_core.students.layer_importance import LayerwiseText
from kd_core.students.student import Student

DOWN, OUTPUT = "mlp.down_proj", "self_attn.o_proj"


@dataclass(frozen=True)
class WidthImportance:
    """Importance of each channel and attention head, in float64 on the CPU.

    Args:
        hidden: of the channels of the residual stream.
        feed_forward: of each layer's feed-forward channels, by the layer's number in the model.
        heads: of each layer's query heads.
        energy: of each norm by its name: mean squares of its input's channels at a root mean square of 1.
    """

    hidden: Float[Tensor, " D"]
    feed_forward: dict[int, Float[Tensor, " I"]]
    heads: dict[int, Float[Tensor, " H"]]
    energy: dict[str, Float[Tensor, " D"]]


@dataclass
class _RowSums:
    """Sums over rows of squared row means, and of plain row means."""

    rows: int = 0
    squares: dict[str, Tensor] = field(default_factory=dict)
    energies: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, magnitudes: Float[Tensor, "B T C"]) -> None:
        # Mean over positions, squared, summed over rows.  [B, T, C] → [C]
        squares = magnitudes.mean(dim=1, dtype=torch.float64).square().sum(dim=0).cpu()
        self.squares[name] = self.squares.get(name, 0) + squares

    def add_energy(self, name: str, x: Float[Tensor, "B T D"]) -> None:
        # Squares at a mean square of 1 in each position, mean over positions, summed over rows.  [B, T, D] → [D]
        squares = x.double().square()
        shares = squares / squares.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        self.energies[name] = self.energies.get(name, 0) + shares.mean(dim=1).sum(dim=0).cpu()

    def root_mean_square(self, name: str) -> Tensor:
        return (self.squares[name] / self.rows).sqrt()


def stream_norms(model: Student) -> dict[str, nn.Module]:
    """Returns the norms on the residual stream, by name."""
    rules = model.sharding_rules()
    modules = dict(model.named_modules())
    return {name: modules[name] for name in modules if rules.get(inside_block(name)) == "norm"}


def inside_block(name: str) -> str:
    """Returns the name of a module inside its block, or in the model if it is in none."""
    return name.split(".", 2)[2] if name.startswith("layers.") and name.count(".") > 1 else name


def _listen(model: Student, layers: Sequence[int], sums: _RowSums, stack: ExitStack) -> list[str]:
    """Hooks the modules whose activations are measured, until `stack` is closed. Returns the names of the norms."""

    def norm_hook(name: str) -> Callable[..., None]:
        def measure(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            sums.add(name, output.abs())
            sums.add_energy(name, args[0])

        return measure

    def input_hook(name: str, magnitudes: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        return lambda _, args: sums.add(name, magnitudes(args[0]))

    def head_norms(x: Tensor) -> Tensor:
        # L2 norm of each head's output.  [B, T, H·d] → [B, T, H]
        return rearrange(x, "B T (H d) -> B T H d", d=model.arch.head_dim).norm(dim=-1, dtype=torch.float64)

    own_blocks = tuple(f"layers.{layer}." for layer in layers)
    norms = [name for name in stream_norms(model) if name.startswith(own_blocks) or not name.startswith("layers.")]
    for name in norms:
        stack.enter_context(model.get_submodule(name).register_forward_hook(norm_hook(name)))
    for layer in layers:
        for inner, magnitudes in ((DOWN, torch.abs), (OUTPUT, head_norms)):
            name = f"layers.{layer}.{inner}"
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(input_hook(name, magnitudes)))
    return norms


@torch.no_grad()
def measure_widths(
    model: Student, layers: Sequence[int], batches: Iterable[Int[Tensor, "B S"]], report: Callable[[int], None]
) -> WidthImportance:
    """Returns the importance of the widths of these layers, in one pass over the text.

    Args:
        model: a decoder whose blocks have `self_attn.o_proj` and `mlp.down_proj`.
        layers: the layers that run, in this order.
        batches: rows of tokens of one document each.
        report: called with the tokens of each batch that is done.
    """
    sums = _RowSums()
    with ExitStack() as stack:
        norms = _listen(model, layers, sums, stack)
        for tokens in batches:
            text = LayerwiseText(model, tokens)
            x = text.embedded
            for layer in layers:
                x = text.run_layer(layer, x)
            model.last_hidden(x)
            sums.rows += len(tokens)
            report(tokens.numel())
    return WidthImportance(
        hidden=torch.stack([sums.root_mean_square(name) for name in norms]).mean(dim=0),
        feed_forward={layer: sums.root_mean_square(f"layers.{layer}.{DOWN}") for layer in layers},
        heads={layer: sums.root_mean_square(f"layers.{layer}.{OUTPUT}") for layer in layers},
        energy={name: sums.energies[name] / sums.rows for name in norms},
    )
