"""The pass over the support alone, for objectives that ask for nothing outside it: K rows of the head a position.

    for a chunk of positions:
        K rows of the weight a position, and their logits [n, K]
        the terms on [n, K], and their derivatives by autograd       objective.py, tails.py, divergences.py
        gradients by hidden states, and by the K rows, added to the weight's

`renormalized` without cross-entropy is such an objective: the student's softmax over the vocabulary cancels out of it.
What this pass does not know of the vocabulary is NaN in its view, so that no term can use it unnoticed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.losses.fused.chunks import Job, Positions
from kd_core.losses.fused.lm_head import Head, HeadGradients
from kd_core.losses.fused.loss_metrics import observe_teacher
from kd_core.losses.fused.softmax import Gradients
from kd_core.losses.fused.vocab_shard import Located
from kd_core.losses.sparse_view import SparseView
from kd_core.types import TeacherTopK

# Rows of the head that are gathered at a time: enough to keep the machine busy, few enough to stay in its cache.
GATHERED_ROWS = 8192


def _distinct(ids: Tensor, used: Tensor) -> Tensor:
    """One used entry for each id of a row: the first of its equals once they are sorted."""
    ranked, order = torch.where(used, ids, -1).sort(dim=1, stable=True)
    first = torch.ones_like(used)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    return used & torch.empty_like(used).scatter_(1, order, first)


def _view(logits: Tensor, chunk: Positions, size: int) -> SparseView:
    """What logits [n, K] of the support tell, with log q renormalised on it."""
    teacher, used = chunk.teacher, chunk.teacher.log_probs > -torch.inf
    distinct = _distinct(teacher.ids, used)
    on_support = torch.where(distinct, logits, -torch.inf).logsumexp(dim=1, keepdim=True)
    support = torch.where(used, logits, -torch.inf)
    unknown = torch.full_like(on_support.squeeze(1), torch.nan).requires_grad_()
    return SparseView(
        teacher_log_probs=teacher.log_probs,
        teacher_tail=teacher.tail_log_prob,
        tempered_tails=teacher.tempered_tails,
        student_log_probs=(support - on_support).requires_grad_(),
        student_logits=support,
        student_tail=unknown,
        student_tail_logit=unknown.detach(),
        student_label=unknown,
        student_log_normaliser=unknown,
        student_tail_mean=unknown,
        distinct=distinct,
        is_label=distinct & (teacher.ids == chunk.labels[:, None]),
        tail_size=size - distinct.sum(dim=1),
    )


@dataclass(frozen=True)
class _Rows:
    """The head's rows at a chunk's ids [n, K, D], in the dtype that is kept; the gradient by them takes their place.

    Where ranks share the vocabulary, a row that is another's is some row of this one, and its logit counts as 0.
    """

    head: Head
    at: Located
    rows: Tensor

    @classmethod
    def gather(cls, head: Head, teacher: TeacherTopK) -> "_Rows":
        """Rows are multiplied in the dtype that is kept: these products cost their memory, not their arithmetic."""
        at = head.part.locate(teacher.ids, teacher.log_probs > -torch.inf, len(head.weight))
        rows = head.weight.index_select(0, at.columns.flatten()).to(head.precision.keep)
        return cls(head, at, rows.view(*at.columns.shape, -1))

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n, K] and the slope of a soft cap."""
        product = torch.bmm(self.rows, hidden[:, :, None]).squeeze(2)
        bias = None if self.head.bias is None else self.head.bias[self.at.columns]
        slope = self.head.finish_(product, bias)
        return self.head.part.sum_(torch.where(self.at.own, product, 0.0)), slope

    def add_gradients_(self, gradients: HeadGradients, at: slice, hidden: Tensor, by_logits: Tensor) -> None:
        """Add a chunk: `by_logits` [n, K] is the gradient by scale · hidden @ weight.T + bias."""
        ids, by_logits = self.at.columns.flatten(), torch.where(self.at.own, by_logits, 0.0)
        if gradients.bias is not None:
            gradients.bias.index_add_(0, ids, by_logits.flatten())
        by_logits = by_logits * self.head.scale
        gradients.hidden[at] = torch.bmm(by_logits[:, None], self.rows).squeeze(1)
        if gradients.weight is not None:
            by_rows = torch.mul(by_logits[:, :, None], hidden[:, None], out=self.rows)
            gradients.weight.index_add_(0, ids, by_rows.flatten(0, 1))


def _needs_no_vocabulary() -> Tensor:
    raise AssertionError("the student's entropy needs the whole vocabulary")


def sums_over_support(job: Job, head: Head, gradients: HeadGradients | None) -> dict[str, Tensor]:
    """The objective's sums; fills the gradients where they are wanted."""
    K, keep, totals = job.data.teacher.ids.shape[1], head.precision.keep, job.no_sums()
    factors = job.position_weights(_needs_no_vocabulary)
    for at in job.slices(max(1, min(job.objective.chunk_tokens, GATHERED_ROWS // K))):
        chunk = job.chunk(at)
        hidden = chunk.hidden.to(keep)
        rows = _Rows.gather(head, chunk.teacher)
        logits, slope = rows.logits(hidden)
        view = _view(logits, chunk, head.vocab_size)
        loss, sums = job.losses({1.0: view}, chunk.mask, {name: each[at] for name, each in factors.items()})
        sums |= observe_teacher(view, chunk.mask)
        totals = {name: total + sums[name].double() for name, total in totals.items()}
        if gradients is not None:
            by_logits = Gradients.of(loss, job.scale, [view])[0].entries
            if slope is not None:
                by_logits = by_logits * slope
            rows.add_gradients_(gradients, at, hidden, by_logits)
    return totals
