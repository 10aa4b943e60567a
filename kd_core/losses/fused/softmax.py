"""The closed form of the softmax: logits to a sparse view, and a loss's derivatives by the view to dL/dlogits.

q is the softmax of z / τ, S the support, and s_j = q_j / q(tail) the softmax over the tail alone. A loss of the view's
five student fields has the derivatives g_k (entries), g_tail, g_label, g_Z (log Z) and g_mean. With
G = Σ g_k + g_tail + g_label + g_mean − g_Z and n the size of the tail,

    τ dL/dz_j = (g_tail − G q(tail)) · s_j + g_mean / n          for j outside S,
    τ dL/dz_j = Σ g_k over the entries k with id j − G q_j       for j in S,   and + g_label at the label.

So any loss costs one softmax over the tail, in place, and work on [n, K]. The tail's mass comes from its own
logsumexp. 1 − Σ q over S would lose all digits to rounding where the support holds nearly everything. Where ranks
share the vocabulary (`vocab_shard.py`), each rank does this on its own columns, with per-position numbers that are the
same on all ranks.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.losses.fused.chunks import Positions
from kd_core.losses.fused.vocab_shard import ShardColumns, VocabShard, VocabStats, empty_stats
from kd_core.losses.sparse_view import SparseView

# Rows that are copied at a time where a pass over the vocabulary needs a second copy of them.
BLOCK_ROWS = 32


class ReducedLogits(NamedTuple):
    """Results of reducing a chunk's logits, which the softmax over the tail has overwritten."""

    view: SparseView
    tail_max: Float[Tensor, " n"]
    """The student's largest logit outside the support; −inf where nothing is outside."""
    entries: ShardColumns
    """Columns of the teacher's entries in this vocab shard."""
    labels: ShardColumns
    tail_share: Tensor | None
    """Share of the tail's mass in this vocab shard. None if the shard is the whole vocabulary."""


class ViewGradients(NamedTuple):
    """d(scale · loss) by the view's student fields, in the order of `SparseView.differentiable_fields`."""

    entries: Float[Tensor, "n K"]
    tail: Float[Tensor, " n"]
    label: Float[Tensor, " n"]
    log_normaliser: Float[Tensor, " n"]
    tail_mean: Float[Tensor, " n"]

    @classmethod
    def from_loss(cls, loss: Tensor, scale: float, views: list[SparseView]) -> "list[ViewGradients]":
        """Computes the gradients by each of the views, one per temperature of the student."""
        leaves = [leaf for view in views for leaf in view.differentiable_fields()]
        # `grad_outputs=scale` would do the same, but makes torch import sympy: 40 MiB.
        with torch.enable_grad():
            scaled = loss * scale
        gradients = torch.autograd.grad(scaled, leaves, allow_unused=True, materialize_grads=True)
        # Five fields per view.
        return [cls(*gradients[start : start + 5]) for start in range(0, len(gradients), 5)]


def _mark_support_(logits: Tensor, entries: ShardColumns) -> tuple[Tensor, Tensor, Tensor]:
    """Finds one distinct entry per id. Overwrites the logits [n, V] at the entries' columns.

    Returns:
        Columns [n, K] that `scatter_` may write for every entry, the mask of distinct entries [n, K], and the mask of
        rows [n, 1] that have an entry in this shard.
    """
    # Index of each entry in its row.  [n, K]
    indices, (columns, in_shard) = (
        torch.arange(entries.columns.shape[1], device=logits.device).expand_as(entries.columns),
        entries,
    )
    row_has_entry = in_shard.any(dim=1, keepdim=True)
    # Redirect entries that are unused, or of another shard, to the row's first entry in this shard. Of a row without
    # any they all go to the column of entry 0, which is no support here: the caller restores its logit.  [n, K]
    if not in_shard.all():
        anchor = in_shard.int().argmax(dim=1, keepdim=True)
        indices = torch.where(in_shard, indices, anchor)
        columns = columns.gather(1, indices)
    # Mark one entry per distinct id: every entry scatters its index, the last writer reads it back.  [n, K]
    marks = indices.to(logits.dtype)
    logits.scatter_(1, columns, marks)
    return columns, in_shard & (logits.gather(1, columns) == marks), row_has_entry


def _tail_statistics_(logits: Tensor, entries: ShardColumns, labels: ShardColumns, needs_tail_sum: bool) -> VocabStats:
    """Computes one shard's statistics of logits / τ [n, V] and overwrites the logits with the softmax over its tail."""
    # Logits of the entries and of the label, before they are overwritten.  [n, K] and [n]
    gathered = logits.gather(1, entries.columns)
    label_logit = logits.gather(1, labels.columns).squeeze(1)
    columns, distinct, row_has_entry = _mark_support_(logits, entries)
    # Rows without an entry in this shard had the logit of entry 0's column overwritten, which is part of the tail.
    restored = gathered[:, :1]
    tail_size = logits.shape[1] - distinct.sum(dim=1)
    # Sum of the tail's logits: the support counts 0.  [n]
    tail_sum = torch.zeros_like(label_logit)
    if needs_tail_sum:
        logits.scatter_(1, columns, torch.where(row_has_entry, 0.0, restored).expand_as(columns))
        tail_sum = logits.sum(dim=1)
    # Softmax over the tail, in place: the support's logits are −inf. Its largest value is e^(max − logsumexp), so
    # logsumexp = max − log of that value, without a second pass of exponentials.  [n, V] and [n]
    logits.scatter_(1, columns, torch.where(row_has_entry, -torch.inf, restored).expand_as(columns))
    tail_max = logits.amax(dim=1)
    tail_logsumexp = tail_max - torch.softmax(logits, dim=1, out=logits).amax(dim=1).log()
    # A row without a tail is the softmax of nothing but −inf, NaN: set it to 0.
    tail_exists = tail_size > 0
    if not tail_exists.all():
        logits.masked_fill_(~tail_exists[:, None], 0.0)
        tail_logsumexp = torch.where(tail_exists, tail_logsumexp, -torch.inf)
    # Entries and labels of other shards count 0, so that shards add up.  [n, K] and [n]
    entry_logits = torch.where(entries.in_shard, gathered, 0.0)
    return VocabStats(
        entry_logits,
        distinct,
        torch.where(labels.in_shard.squeeze(1), label_logit, 0.0),
        tail_sum,
        tail_size,
        tail_max,
        tail_logsumexp,
    )


def reduce_logits_(logits: Tensor, chunk: Positions, shard: VocabShard, needs_tail_mean: bool) -> ReducedLogits:
    """Builds the view of logits / τ [n, V] and overwrites the logits with the softmax over the tail."""
    # Columns of the K entries and of the label in this shard.  [n, K] and [n, 1]
    teacher, used, V = chunk.teacher, chunk.teacher.log_probs > -torch.inf, logits.shape[1]
    entries = shard.locate(teacher.ids, used, V)
    labels = shard.locate(chunk.labels[:, None], torch.ones_like(chunk.mask)[:, None], V)
    # Statistics of the whole vocabulary, the same on all ranks. A shard of padding takes part with neutral ones.
    padding_stats = empty_stats(logits.zero_(), used.shape[1]) if shard.padding else None
    stats, tail_share = shard.all_reduce(padding_stats or _tail_statistics_(logits, entries, labels, needs_tail_mean))
    tail_exists = stats.tail_size > 0
    tail_mean = stats.tail_sum / stats.tail_size.clamp(min=1)
    # log Z = logaddexp(logsumexp over the distinct entries, logsumexp over the tail).  [n]
    support = torch.where(used, stats.entry_logits, -torch.inf)
    on_support = torch.where(stats.distinct, support, -torch.inf).logsumexp(dim=1)
    normaliser = torch.logaddexp(on_support, stats.tail_logsumexp)
    # log q = z / τ − log Z. The fields that losses are differentiated by become leaves of autograd.
    view = SparseView(
        teacher_log_probs=teacher.log_probs,
        teacher_tail=teacher.tail_log_prob,
        tempered_tails=teacher.tempered_tails,
        student_log_probs=(support - normaliser[:, None]).requires_grad_(),
        student_logits=support,
        student_tail=(stats.tail_logsumexp - normaliser).requires_grad_(),
        student_tail_logit=stats.tail_logsumexp,
        student_label=(stats.label_logit - normaliser).requires_grad_(),
        student_log_normaliser=normaliser.requires_grad_(),
        student_tail_mean=torch.where(
            tail_exists & needs_tail_mean, tail_mean - normaliser.detach(), 0.0
        ).requires_grad_(),
        distinct=stats.distinct,
        is_label=stats.distinct & (teacher.ids == chunk.labels[:, None]),
        tail_size=stats.tail_size,
    )
    return ReducedLogits(view, stats.tail_max, entries, labels, tail_share)


def student_entropy(tail_softmax: Tensor, reduced: ReducedLogits, shard: VocabShard) -> Float[Tensor, " n"]:
    """Computes −Σ q log q over the whole vocabulary, in nats.

    It costs one more pass over the vocabulary, and an all-reduce where ranks share it.
    """
    view, tail_share = reduced.view, reduced.tail_share
    # Entropy of the softmax s over the tail, −Σ s log s. Over shards of share w, it is Σ w · (entropy − log w).  [n]
    tail_entropy = torch.cat([torch.special.entr(rows).sum(dim=1) for rows in tail_softmax.split(BLOCK_ROWS)])
    if tail_share is not None:
        tail_entropy = shard.all_reduce_sum_(tail_share * tail_entropy + torch.special.entr(tail_share))
    # −Σ q log q over S, plus q(tail) · (tail entropy − log q(tail)).  [n]
    log_probs, tail = view.student_log_probs.detach(), view.student_tail.detach()
    on_support = -torch.where(view.distinct, log_probs.exp() * log_probs, 0.0).sum(dim=1)
    return on_support + tail.exp() * (tail_entropy - torch.where(view.tail_size > 0, tail, 0.0))


def write_dlogits_(tail_softmax: Tensor, reduced: ReducedLogits, g: ViewGradients) -> None:
    """Overwrites the tail's softmax [n, V] with τ dL/dz, by the formula at the head of this module."""
    view, entries, labels = reduced.view, reduced.entries, reduced.labels
    # G = Σ g_k + g_tail + g_label + g_mean − g_Z.  [n]
    G = g.entries.sum(dim=1) + g.tail + g.label + g.tail_mean - g.log_normaliser
    # Support: g_k − G q_j. G q_j counts once per id, at its distinct entry.  [n, K]
    dentries = g.entries - torch.where(view.distinct, G[:, None] * view.student_log_probs.detach().exp(), 0.0)
    # Tail: (g_tail − G q(tail)) · s_j. The buffer has s_j of this shard's tail, so its share makes it s_j of the whole
    # tail. It is 0 on the support.  [n, V]
    tail_factor = g.tail - G * view.student_tail.detach().exp()
    tail_softmax.mul_((tail_factor if reduced.tail_share is None else tail_factor * reduced.tail_share)[:, None])
    # g_mean / n on the tail: add it to all columns, and take it off the support.  [n, V] and [n, K]
    if g.tail_mean.any():
        by_mean = g.tail_mean / view.tail_size.clamp(min=1)
        tail_softmax.add_(by_mean[:, None])
        dentries = dentries - torch.where(view.distinct, by_mean[:, None], 0.0)
    # Add the support and the label last: their differences were made on [n, K], in float32 at least.
    tail_softmax.scatter_add_(1, entries.columns, torch.where(entries.in_shard, dentries, 0.0))
    tail_softmax.scatter_add_(1, labels.columns, torch.where(labels.in_shard, g.label[:, None], 0.0))
