"""Which layers of a model matter, measured on text; a student keeps those that do (`Pretrained.keep_layers`).

Three measures, from cheap to dear:

- influence: 1 − mean cosine between what goes into a layer and what comes out (ShortGPT, arXiv 2403.03853). One pass.
- alone: how much the NLL rises without this one layer. A pass a layer.
- greedy: drop the layer without which the NLL is lowest, and again among those left, until few enough are left. What
  two neighbours do for each other shows only here.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from kd_core.students.decoder.attention import Segment
from kd_core.students.decoder.decoder import Decoder, scaled
from kd_core.students.decoder.rope import rotary_angles

CHUNK = 512


@dataclass(frozen=True)
class Drop:
    """A layer, and the mean NLL in nats per token once it is dropped too."""

    layer: int
    nll: float


class LayerwiseText:
    """A model on one batch of text: any of its layers one after the other, from any place.

    Args:
        model: the model; its own adapters and precision count.
        tokens: rows of S tokens of one document each; T = S − 1 are scored.
    """

    def __init__(self, model: Decoder, tokens: Int[Tensor, "B S"]) -> None:
        self.model, self.labels = model, tokens[:, 1:].flatten()
        positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand_as(tokens[:, 1:])
        arch = model.arch
        self.cos, self.sin = rotary_angles(positions, arch.head_dim, arch.rope_theta, arch.rope_scaling)
        self.segments: list[Segment] | None = None
        self.embedded: Float[Tensor, "B T D"] = scaled(model.embed_tokens(tokens[:, :-1]), arch.embedding_scale)

    def through(self, layer: int, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What comes out of a layer."""
        return self.model.layers[layer](x, self.cos, self.sin, self.segments)

    def nll(self, x: Float[Tensor, "B T D"]) -> float:
        """Mean NLL in nats per token of what comes out of the last layer."""
        hidden = rearrange(scaled(self.model.norm(x), self.model.arch.logit_scale), "B T D -> (B T) D")
        weight, total = self.model.lm_head.weight[: self.model.arch.vocab_size], 0.0
        for rows, labels in zip(hidden.split(CHUNK), self.labels.split(CHUNK), strict=True):
            total += float(F.cross_entropy((rows @ weight.t()).float(), labels, reduction="sum"))
        return total / len(self.labels)

    def entries(self, layers: Sequence[int]) -> list[Tensor]:
        """What goes into each of these layers, one behind the other, and what comes out of the last."""
        found = [self.embedded]
        for layer in layers:
            found.append(self.through(layer, found[-1]))
        return found


@torch.no_grad()
def block_influence(text: LayerwiseText) -> list[float]:
    """1 − mean cosine of a layer's input and output, by layer; 0 for one that changes no direction."""
    entries = text.entries(range(text.model.arch.num_layers))
    return [
        1.0 - float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean())
        for before, after in itertools.pairwise(entries)
    ]


@torch.no_grad()
def nll_without_each(text: LayerwiseText, layers: Sequence[int]) -> list[Drop]:
    """For each of `layers`, which are all that is left: the NLL without it. Layers before it are computed once."""
    entries, found = text.entries(layers), list[Drop]()
    for at, layer in enumerate(layers):
        x = entries[at]
        for after in layers[at + 1 :]:
            x = text.through(after, x)
        found.append(Drop(layer, text.nll(x)))
    return found


@torch.no_grad()
def nll_of(text: LayerwiseText, layers: Sequence[int]) -> float:
    """The NLL with these layers alone."""
    return text.nll(text.entries(layers)[-1])


def drop_greedily(text: LayerwiseText, keep: int, tell: Callable[[Drop], None]) -> list[Drop]:
    """Layers in the order in which they are dropped until `keep` are left; `tell` hears of each."""
    left, dropped = list(range(text.model.arch.num_layers)), list[Drop]()
    while len(left) > keep:
        best = min(nll_without_each(text, left), key=lambda drop: drop.nll)
        left.remove(best.layer)
        dropped.append(best)
        tell(best)
    return dropped


def kept_of(scores: Sequence[float], keep: int) -> tuple[int, ...]:
    """The layers of the highest scores, in order."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda layer: -scores[layer])[:keep]))
