"""The pass over the whole vocabulary, in chunks of positions: logits of all positions never exist at once.

    (the student's entropy at all positions, where a term selects by it)
    for a chunk of positions:
        logits [n, V], and statistics of their tail                   backend.py
        the sparse view per temperature of the student                softmax.py
        the terms on [n, K], and their derivatives by autograd        objective.py, tails.py, divergences.py
        dL/dlogits from these derivatives                             softmax.py
        gradients by hidden states and by weight                      backend.py

A term at a student temperature other than 1 costs one more buffer and softmax, where torch operations are the backend.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.losses.fused.backend import LossBackend
from kd_core.losses.fused.choose_backend import backend_of
from kd_core.losses.fused.chunks import LossCall, Positions
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.loss_metrics import extra_metric_sums, metric_sums
from kd_core.losses.fused.softmax import (
    ReducedLogits,
    ViewGradients,
    logit_gradients,
    reduce_logits_,
    student_entropy,
)


@dataclass(frozen=True)
class _FullVocabPass:
    """One call of the loss, the backend that holds the logits of its current chunk, and the slices of all chunks."""

    call: LossCall
    backend: LossBackend
    slices: list[slice]

    @classmethod
    def allocate(cls, call: LossCall, head: LmHead) -> "_FullVocabPass":
        """Allocates the backend's memory for the longest chunk."""
        chunk_tokens = min(len(call.positions.hidden), call.objective.chunk_tokens or head.chunk_positions())
        terms = call.objective.terms.values()
        temperatures = [1.0, *sorted({term.view_temperature for term in terms} - {1.0})]
        backend = backend_of(head.weight)(head, chunk_tokens, temperatures)
        return cls(call, backend, list(call.chunk_slices(max(1, chunk_tokens))))

    def reduce_(self, chunk: Positions) -> dict[float, ReducedLogits]:
        """Computes the logits of a chunk, and reduces them for each temperature of the student."""
        self.backend.logits_(chunk.hidden)
        terms = self.call.objective.terms.values()
        return reduce_logits_(self.backend, chunk, {term.view_temperature for term in terms if term.needs_tail_mean})

    def student_entropies(self) -> Tensor:
        """Computes the student's entropy at all positions [N], which costs the logits of all of them."""
        entropies: list[Tensor] = []
        for positions in self.slices:
            reduced = self.reduce_(self.call.chunk(positions))
            entropies.append(student_entropy(self.backend, reduced[1.0]))
        return torch.cat(entropies)


def sum_over_vocabulary(call: LossCall, head: LmHead, gradients: LmHeadGradients | None) -> dict[str, Tensor]:
    """Computes the objective's sums over all positions, and adds to the gradients unless they are None."""
    full_pass = _FullVocabPass.allocate(call, head)
    chunk_sums: list[dict[str, Tensor]] = []
    if gradients is not None:
        full_pass.backend.begin_gradients_(gradients)
    backend, factors = full_pass.backend, call.position_weights(full_pass.student_entropies)
    for positions in full_pass.slices:
        # Logits to views.  [n, V] → [n, K]
        chunk = call.chunk(positions)
        reduced = full_pass.reduce_(chunk)
        views = {temperature: reduced_logits.view for temperature, reduced_logits in reduced.items()}
        # Loss and metrics, in float32 over the chunk and in float64 over chunks.
        loss, sums = call.weighted_loss(
            views, chunk.mask, {name: factor[positions] for name, factor in factors.items()}
        )
        sums |= metric_sums(reduced[1.0], chunk.mask)
        sums |= extra_metric_sums(call.objective.observe, reduced[1.0], backend, chunk.mask)
        chunk_sums.append(sums)
        if gradients is None:
            continue
        # Derivatives by the views to dL/dlogits, and on into the gradients.  [n, K] → [n, V]
        by_view = ViewGradients.from_loss(loss, call.scale, list(views.values()))
        by_temperature = {
            temperature: logit_gradients(reduced_logits, g)
            for (temperature, reduced_logits), g in zip(reduced.items(), by_view, strict=True)
        }
        backend.add_gradients_(gradients, positions, chunk.hidden, by_temperature)
    return call.add_sums(chunk_sums)
