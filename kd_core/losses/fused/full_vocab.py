"""The pass over the whole vocabulary: logits of all positions never exist at once.

    (uncertainty of all positions, where a term selects by it)
    for a chunk of positions:
        logits [n, V] into the one buffer                            matmuls.py
        sparse view, and the softmax over the tail in their place    reduction.py
        the terms on [n, K], and their derivatives by autograd       objective.py, tails.py, divergences.py
        dL/dlogits into the same buffer                              reduction.py
        two matmuls: gradients by hidden states and by weight        matmuls.py

A term at a student temperature other than 1 costs one more buffer and softmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.losses.fused.chunks import Job, Positions
from kd_core.losses.fused.lm_head import Head, HeadGradients
from kd_core.losses.fused.loss_metrics import observe, observe_further
from kd_core.losses.fused.matmuls import Matmuls
from kd_core.losses.fused.softmax import Gradients, Reduced, reduce_, student_entropy, write_gradient_


@dataclass(frozen=True)
class _Pass:
    """A job, the head's matmuls, and buffers for one chunk: one a temperature of the student."""

    job: Job
    matmuls: Matmuls
    buffers: dict[float, Tensor]

    @classmethod
    def make(cls, job: Job, head: Head) -> "_Pass":
        """Nothing is in the buffers yet."""
        shape = (min(len(job.data.hidden), job.objective.chunk_tokens), len(head.weight))
        terms = job.objective.terms.values()
        temperatures = [1.0, *sorted({term.view_temperature for term in terms} - {1.0})]
        device, dtype = job.data.hidden.device, head.precision.keep
        buffers = {at: torch.empty(shape, device=device, dtype=dtype) for at in temperatures}
        return cls(job, Matmuls.of(head), buffers)

    def reduce(self, chunk: Positions) -> tuple[dict[float, Reduced], Tensor | None]:
        """Logits into the first buffer, and all buffers reduced; also the slope of a soft cap."""
        n = len(chunk.hidden)
        logits = self.buffers[1.0][:n]
        slope = self.matmuls.logits_(chunk.hidden, logits)
        for temperature, buffer in self.buffers.items():
            if temperature != 1:
                torch.div(logits, temperature, out=buffer[:n])
        means = {term.view_temperature for term in self.job.objective.terms.values() if term.needs_tail_mean}
        part = self.matmuls.head.part
        reduced = {at: reduce_(buffer[:n], chunk, part, at in means) for at, buffer in self.buffers.items()}
        return reduced, slope

    def tail_softmax(self, chunk: Positions) -> Tensor:
        """What a chunk that was just reduced has left in the first buffer."""
        return self.buffers[1.0][: len(chunk.hidden)]

    def entropies(self) -> Tensor:
        """The student's at all positions, which costs the logits of all of them."""
        found = [self.buffers[1.0].new_empty(0)]
        for rows in self.job.slices(self.job.objective.chunk_tokens):
            chunk = self.job.chunk(rows)
            reduced, _ = self.reduce(chunk)
            found.append(student_entropy(self.tail_softmax(chunk), reduced[1.0], self.matmuls.head.part))
        return torch.cat(found)

    def write_gradient(self, chunk: Positions, reduced: dict[float, Reduced], loss: Tensor) -> Tensor:
        """dL/dlogits of a chunk, in the first buffer."""
        views = [each.view for each in reduced.values()]
        n = len(chunk.hidden)
        for (temperature, buffer), each, by_view in zip(
            self.buffers.items(), reduced.values(), Gradients.of(loss, self.job.scale, views), strict=True
        ):
            write_gradient_(buffer[:n], each, by_view)
            if temperature != 1:
                self.buffers[1.0][:n].add_(buffer[:n], alpha=1 / temperature)
        by_logits = self.buffers[1.0][:n]
        return by_logits.zero_() if self.matmuls.head.part.padding else by_logits


def sums_over_vocabulary(job: Job, head: Head, gradients: HeadGradients | None) -> dict[str, Tensor]:
    """The objective's sums; fills the gradients where they are wanted."""
    this, totals = _Pass.make(job, head), job.no_sums()
    factors = job.position_weights(this.entropies)
    for rows in job.slices(job.objective.chunk_tokens):
        chunk = job.chunk(rows)
        reduced, slope = this.reduce(chunk)
        views = {at: each.view for at, each in reduced.items()}
        loss, sums = job.losses(views, chunk.mask, {name: each[rows] for name, each in factors.items()})
        sums |= observe(reduced[1.0], chunk.mask)
        sums |= observe_further(job.objective.observe, reduced[1.0], this.tail_softmax(chunk), head.part, chunk.mask)
        totals = {name: total + sums[name].double() for name, total in totals.items()}
        if gradients is None:
            continue
        by_logits = this.write_gradient(chunk, reduced, loss)
        if slope is not None:
            by_logits.mul_(slope)
        this.matmuls.add_gradients_(gradients, rows, chunk.hidden, by_logits)
    return totals
