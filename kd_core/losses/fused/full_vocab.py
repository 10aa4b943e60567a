"""The pass over the whole vocabulary, in chunks of positions: logits of all positions never exist at once.

    (the student's entropy at all positions, where a term selects by it)
    for a chunk of positions:
        logits [n, V] into the one buffer                             matmuls.py
        the sparse view, and the softmax over the tail in their place softmax.py
        the terms on [n, K], and their derivatives by autograd        objective.py, tails.py, divergences.py
        dL/dlogits into the same buffer                               softmax.py
        two matmuls: gradients by hidden states and by weight         matmuls.py

A term at a student temperature other than 1 costs one more buffer and softmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.losses.fused.chunks import LossCall, Positions
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.loss_metrics import extra_metric_sums, metric_sums
from kd_core.losses.fused.matmuls import Matmuls
from kd_core.losses.fused.softmax import ReducedLogits, ViewGradients, reduce_logits_, student_entropy, write_dlogits_


@dataclass(frozen=True)
class _FullVocabPass:
    """One call of the loss, the matmuls of its lm_head, and a buffer [chunk, V] per temperature of the student."""

    call: LossCall
    matmuls: Matmuls
    buffers: dict[float, Tensor]

    @classmethod
    def allocate(cls, call: LossCall, head: LmHead) -> "_FullVocabPass":
        """Allocates the buffers. The first is that of temperature 1, from which all others are made."""
        shape = (min(len(call.positions.hidden), call.objective.chunk_tokens), len(head.weight))
        terms = call.objective.terms.values()
        temperatures = [1.0, *sorted({term.view_temperature for term in terms} - {1.0})]
        device, dtype = call.positions.hidden.device, head.precision.accum_dtype
        buffers = {temperature: torch.empty(shape, device=device, dtype=dtype) for temperature in temperatures}
        return cls(call, Matmuls.from_head(head), buffers)

    def reduce_(self, chunk: Positions) -> tuple[dict[float, ReducedLogits], Tensor | None]:
        """Computes the views of a chunk and leaves the softmax over the tail in each buffer.

        Returns:
            The reduced logits by temperature, and the derivative of the soft cap [n, V] or None.
        """
        n = len(chunk.hidden)
        # Logits, and for every other temperature logits / τ.  [n, V]
        logits = self.buffers[1.0][:n]
        slope = self.matmuls.logits_(chunk.hidden, logits)
        for temperature, buffer in self.buffers.items():
            if temperature != 1:
                torch.div(logits, temperature, out=buffer[:n])
        # The tail's mean costs a pass over V, so it is computed only for the views whose terms read it.
        mean_temperatures = {
            term.view_temperature for term in self.call.objective.terms.values() if term.needs_tail_mean
        }
        shard = self.matmuls.head.shard
        reduced = {
            temperature: reduce_logits_(buffer[:n], chunk, shard, temperature in mean_temperatures)
            for temperature, buffer in self.buffers.items()
        }
        return reduced, slope

    def tail_softmax(self, chunk: Positions) -> Tensor:
        """Returns the softmax over the tail at temperature 1 [n, V] that `reduce_` has left in the first buffer."""
        return self.buffers[1.0][: len(chunk.hidden)]

    def student_entropies(self) -> Tensor:
        """Computes the student's entropy at all positions [N], which costs the logits of all of them."""
        entropies = [self.buffers[1.0].new_empty(0)]
        for rows in self.call.chunk_slices(self.call.objective.chunk_tokens):
            chunk = self.call.chunk(rows)
            reduced, _ = self.reduce_(chunk)
            entropies.append(student_entropy(self.tail_softmax(chunk), reduced[1.0], self.matmuls.head.shard))
        return torch.cat(entropies)

    def write_dlogits_(self, chunk: Positions, reduced: dict[float, ReducedLogits], loss: Tensor) -> Tensor:
        """Writes dL/dlogits [n, V] of a chunk into the first buffer."""
        views = [reduced_logits.view for reduced_logits in reduced.values()]
        n = len(chunk.hidden)
        # τ dL/dz of each view into its own buffer, and the sum of dL/dz over views into the first one.  [n, V]
        for (temperature, buffer), reduced_logits, view_gradients in zip(
            self.buffers.items(), reduced.values(), ViewGradients.from_loss(loss, self.call.scale, views), strict=True
        ):
            write_dlogits_(buffer[:n], reduced_logits, view_gradients)
            if temperature != 1:
                self.buffers[1.0][:n].add_(buffer[:n], alpha=1 / temperature)
        dlogits = self.buffers[1.0][:n]
        # The one row of a shard of padding is no real token.
        return dlogits.zero_() if self.matmuls.head.shard.padding else dlogits


def sum_over_vocabulary(call: LossCall, head: LmHead, gradients: LmHeadGradients | None) -> dict[str, Tensor]:
    """Computes the objective's sums over all positions, and adds to the gradients unless they are None."""
    full_pass, totals = _FullVocabPass.allocate(call, head), call.zero_sums()
    factors = call.position_weights(full_pass.student_entropies)
    for rows in call.chunk_slices(call.objective.chunk_tokens):
        # Logits to views. Buffers now hold softmaxes over the tail.  [n, V] → [n, K]
        chunk = call.chunk(rows)
        reduced, slope = full_pass.reduce_(chunk)
        views = {temperature: reduced_logits.view for temperature, reduced_logits in reduced.items()}
        # Loss and metrics, in float32 over the chunk and in float64 over chunks.
        loss, sums = call.weighted_loss(views, chunk.mask, {name: factor[rows] for name, factor in factors.items()})
        sums |= metric_sums(reduced[1.0], chunk.mask)
        sums |= extra_metric_sums(
            call.objective.observe, reduced[1.0], full_pass.tail_softmax(chunk), head.shard, chunk.mask
        )
        totals = {name: total + sums[name].double() for name, total in totals.items()}
        if gradients is None:
            continue
        # dL/dlogits over the softmaxes, through the soft cap, and into the gradients.  [n, V]
        dlogits = full_pass.write_dlogits_(chunk, reduced, loss)
        if slope is not None:
            dlogits.mul_(slope)
        full_pass.matmuls.add_gradients_(gradients, rows, chunk.hidden, dlogits)
    return totals
