"""The pass over the support alone, for objectives that read nothing outside it: K rows of the lm_head per position.

    for a chunk of positions:
        K rows of the weight per position, and their logits [n, K]
        the terms on [n, K], and their derivatives by autograd       objective.py, tails.py, divergences.py
        gradients by hidden states, and by the K rows, added to the weight's

`renormalized` without cross-entropy is such an objective: the student's normaliser over the vocabulary cancels. Fields
of the view that need the vocabulary are NaN, so that a term that reads one by mistake gives NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.losses.fused.choose_backend import backend_of
from kd_core.losses.fused.chunks import LossCall, Positions
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.loss_metrics import teacher_metric_sums
from kd_core.losses.fused.softmax import ViewGradients
from kd_core.losses.fused.vocab_shard import ShardColumns
from kd_core.losses.sparse_view import SparseView
from kd_core.types import TeacherTopK


def _distinct(ids: Tensor, used: Tensor) -> Tensor:
    """Marks one used entry per id of each row: the first of equal ones."""
    # A stable sort puts equal ids side by side, and unused entries, as id −1, in front.  [n, K]
    ranked, order = torch.where(used, ids, -1).sort(dim=1, stable=True)
    # The first of each run of equal ids, moved back to its place.  [n, K]
    first = torch.ones_like(used)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    return used & torch.empty_like(used).scatter_(1, order, first)


def _view(logits: Tensor, chunk: Positions, vocab_size: int) -> SparseView:
    """Builds the view from logits [n, K] of the support, with log q renormalised on the support."""
    # logsumexp over the distinct entries stands for log Z.  [n, 1]
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
        tail_size=vocab_size - distinct.sum(dim=1),
    )


@dataclass(frozen=True)
class _HeadRows:
    """The lm_head's rows at a chunk's ids [n, K, D], in `accum_dtype`. Their gradient overwrites them.

    Where ranks share the vocabulary, ids of other shards get some row of this one, and a logit of 0.
    """

    head: LmHead
    entries: ShardColumns
    rows: Tensor

    @classmethod
    def gather(cls, head: LmHead, teacher: TeacherTopK) -> "_HeadRows":
        """Gathers the rows in `accum_dtype`, since these products cost memory traffic and hardly any arithmetic."""
        entries = head.shard.locate(teacher.ids, teacher.log_probs > -torch.inf, len(head.weight))
        rows = head.weight.index_select(0, entries.columns.flatten()).to(head.precision.accum_dtype)
        return cls(head, entries, rows.view(*entries.columns.shape, -1))

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Computes logits [n, K] and the derivative of the soft cap, or None without a soft cap."""
        # One product per position: [n, K, D] @ [n, D, 1] → [n, K].
        product = torch.bmm(self.rows, hidden[:, :, None]).squeeze(2)
        bias = None if self.head.bias is None else self.head.bias[self.entries.columns]
        slope = self.head.to_logits_(product, bias)
        # Each id belongs to one shard: all others add 0.
        return self.head.shard.all_reduce_sum_(torch.where(self.entries.in_shard, product, 0.0)), slope

    def add_gradients_(self, gradients: LmHeadGradients, positions: slice, hidden: Tensor, dlogits: Tensor) -> None:
        """Adds the gradients of one chunk.

        Args:
            gradients: those of all chunks.
            positions: the positions of the chunk.
            hidden: their hidden states [n, D].
            dlogits: the gradient [n, K] by scale · hidden @ weight.T + bias.
        """
        # Entries of other shards add 0 to whatever row they were given.  [n, K]
        ids, dlogits = self.entries.columns.flatten(), torch.where(self.entries.in_shard, dlogits, 0.0)
        if gradients.bias is not None:
            gradients.bias.index_add_(0, ids, dlogits.flatten())
        dlogits = dlogits * self.head.scale
        # dhidden = Σ over entries of dlogits · row: [n, 1, K] @ [n, K, D] → [n, D].
        gradients.hidden[positions] = torch.bmm(dlogits[:, None], self.rows).squeeze(1)
        # dweight: the outer product dlogits · hidden over the gathered rows, added at their ids.  [n, K, D]
        if gradients.weight is not None:
            drows = torch.mul(dlogits[:, :, None], hidden[:, None], out=self.rows)
            gradients.weight.index_add_(0, ids, drows.flatten(0, 1))


def _no_student_entropy() -> Tensor:
    raise AssertionError("the student's entropy needs the whole vocabulary")


def sum_over_support(call: LossCall, head: LmHead, gradients: LmHeadGradients | None) -> dict[str, Tensor]:
    """Computes the objective's sums over all positions, and adds to the gradients unless they are None."""
    if gradients is not None:
        gradients.zero_weight_()
    K, accum_dtype = call.positions.teacher.ids.shape[1], head.precision.accum_dtype
    chunk_sums: list[dict[str, Tensor]] = []
    factors = call.position_weights(_no_student_entropy)
    chunk_tokens = call.objective.chunk_tokens or head.chunk_positions()
    gathered_rows = backend_of(head.weight).gathered_rows
    for positions in call.chunk_slices(max(1, min(chunk_tokens, gathered_rows // K))):
        # Rows of the lm_head and their logits to a view.  [n, K, D] → [n, K]
        chunk = call.chunk(positions)
        hidden = chunk.hidden.to(accum_dtype)
        rows = _HeadRows.gather(head, chunk.teacher)
        logits, slope = rows.logits(hidden)
        view = _view(logits, chunk, head.vocab_size)
        # Loss and metrics, in float32 over the chunk and in float64 over chunks.
        loss, sums = call.weighted_loss(
            {1.0: view}, chunk.mask, {name: factor[positions] for name, factor in factors.items()}
        )
        sums |= teacher_metric_sums(view, chunk.mask)
        chunk_sums.append(sums)
        if gradients is not None:
            # The gradient by log q is also that by the logits, since a constant added to a row changes no term here.
            dlogits = ViewGradients.from_loss(loss, call.scale, [view])[0].entries
            if slope is not None:
                dlogits = dlogits * slope
            rows.add_gradients_(gradients, positions, hidden, dlogits)
    return call.add_sums(chunk_sums)
