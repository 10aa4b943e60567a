"""Importance of a model's layers, measured on text, for `Pretrained.keep_layers` of a student.

Three measures, from cheap to expensive:

- influence: 1 − mean cosine between input and output of a layer (ShortGPT, arXiv 2403.03853). One pass.
- alone: the rise of the NLL without this one layer. One pass for each layer.
- greedy: drops the layer without which the NLL is lowest, and repeats that among the layers left, until few enough
  are left. Only this measures how neighbouring layers make up for each other.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from kd_core.logit_products import chunk_positions, multiply_, product_weight
from kd_core.students.student import Student

Measure = Literal["greedy", "alone", "influence"]


@dataclass(frozen=True)
class Drop:
    """A dropped layer, and the mean NLL in nats per token without it and all layers dropped before."""

    layer: int
    nll: float


class LayerwiseText:
    """A model on one batch of text, which runs any of its layers in any order.

    Args:
        model: the model, with its adapters and in its precision.
        tokens: rows of S tokens of one document each. T = S − 1 positions of a row are scored.

    Raises:
        UsageError: the rows are longer than documents that the model may have.
    """

    def __init__(self, model: Student, tokens: Int[Tensor, "B S"]) -> None:
        model.arch.check_length(tokens.shape[1] - 1, "row_length")
        # Position t predicts token t + 1.  labels [B·T]
        self.model, self.tokens, self.labels = model, tokens, tokens[:, 1:].flatten()
        positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand_as(tokens[:, 1:])
        self.context = model.context(positions, None)
        self.embedded: Float[Tensor, "B T D"] = model.embed(tokens[:, :-1])

    def run_layer(self, layer: int, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Returns the output of a layer for the input `x`."""
        return self.model.run_block(layer, x, self.context)

    def nll(self, x: Float[Tensor, "B T D"]) -> float:
        """Returns the mean NLL in nats per token, from the output of the last layer."""
        hidden = rearrange(self.model.last_hidden(x), "B T D -> (B T) D")
        form = self.model.lm_head_form
        weight = product_weight(self.model.lm_head.weight[: form.vocab_size].detach())
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        # Chunks bound the logits to [chunk, V], which are float32. Sums are divided once.
        chunk = chunk_positions(len(weight), hidden.device)
        buffer = torch.empty(min(len(hidden), chunk), len(weight), device=hidden.device)
        for rows, labels in zip(hidden.split(chunk), self.labels.split(chunk), strict=True):
            logits = buffer[: len(rows)]
            multiply_(rows, weight, logits, hidden.dtype)
            total += F.cross_entropy(form.to_logits(logits), labels, reduction="sum")
        return float(total) / len(self.labels)

    def activations(self, layers: Sequence[int]) -> list[Tensor]:
        """Runs these layers one after the other and returns the input of each, then the output of the last."""
        activations = [self.embedded]
        for layer in layers:
            activations.append(self.run_layer(layer, activations[-1]))
        return activations


@torch.no_grad()
def block_influence(text: LayerwiseText) -> list[float]:
    """Returns 1 − mean cosine of input and output for each layer. It is 0 for a layer that changes no direction."""
    activations = text.activations(range(text.model.arch.num_layers))
    return [
        1.0 - float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean())
        for before, after in itertools.pairwise(activations)
    ]


@torch.no_grad()
def nll_without_each(text: LayerwiseText, layers: Sequence[int]) -> list[Drop]:
    """Returns the NLL without each one of `layers`, which are the layers that are left.

    Layers before the dropped one are computed once for all.
    """
    activations, drops = text.activations(layers), list[Drop]()
    for i, layer in enumerate(layers):
        # Skip layer i: its input goes into the next one.
        x = activations[i]
        for later in layers[i + 1 :]:
            x = text.run_layer(later, x)
        drops.append(Drop(layer, text.nll(x)))
    return drops


@torch.no_grad()
def nll_with_layers(text: LayerwiseText, layers: Sequence[int]) -> float:
    """Returns the NLL with these layers alone."""
    return text.nll(text.activations(layers)[-1])


def drop_greedily(text: LayerwiseText, keep: int, report: Callable[[Drop], None]) -> list[Drop]:
    """Drops the least important layer until `keep` are left, and returns the drops in order.

    `report` is called after each drop.
    """
    left, dropped = list(range(text.model.arch.num_layers)), list[Drop]()
    while len(left) > keep:
        best = min(nll_without_each(text, left), key=lambda drop: drop.nll)
        left.remove(best.layer)
        dropped.append(best)
        report(best)
    return dropped


def top_layers(scores: Sequence[float], keep: int) -> tuple[int, ...]:
    """Returns the `keep` layers with the highest scores, in the order of the model."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda layer: -scores[layer])[:keep]))


def choose_layers(
    text: LayerwiseText, measure: Measure, keep: int, report: Callable[[Drop], None]
) -> tuple[list[float], tuple[int, ...]]:
    """Returns a score per layer, higher where it matters more, and the layers to keep.

    Args:
        text: the model on a text.
        measure: `influence` is one pass, `alone` one a layer, and `greedy` one a layer for each layer that goes.
        keep: how many layers stay.
        report: called with each layer that `greedy` drops.
    """
    layers = range(text.model.arch.num_layers)
    if measure == "influence":
        scores = block_influence(text)
        return scores, top_layers(scores, keep)
    if measure == "alone":
        base = nll_with_layers(text, layers)
        scores = [drop.nll - base for drop in nll_without_each(text, layers)]
        return scores, top_layers(scores, keep)
    # The score of a dropped layer is its place in the order. Those that stay share the highest.
    order = [drop.layer for drop in drop_greedily(text, keep, report)]
    scores = [float(order.index(layer) + 1) if layer in order else float(len(order) + 1) for layer in layers]
    return scores, tuple(layer for layer in layers if layer not in order)
