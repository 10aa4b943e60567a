"""The closed form of the softmax: logits to a sparse view, and a loss's derivatives by the view to dL/dlogits.

q is the softmax of z / τ, S the support, and s_j = q_j / q(tail) the softmax over the tail alone. A loss of the view's
five student fields has the derivatives g_k (entries), g_tail, g_label, g_Z (log Z) and g_mean. From
τ ∂log q_i/∂z_j = δ_ij − q_j follows, with G = Σ g_k + g_tail + g_label + g_mean − g_Z and n the size of the tail,

    τ dL/dz_j = (g_tail − G q(tail)) · s_j + g_mean / n          for j outside S,
    τ dL/dz_j = Σ g_k over the entries k with id j − G q_j       for j in S,   and + g_label at the label.

So any loss costs one softmax over the tail, in place, and work on [n, K]. The tail's mass comes from its own
logsumexp. 1 − Σ q over S would lose all digits to rounding where the support holds nearly everything. Where ranks
share the vocabulary (`vocab_shard.py`), each rank does this on its own columns, with per-position numbers that are the
same on all ranks.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.losses.fused.backend import LogitGradients, LossBackend
from kd_core.losses.fused.chunks import Positions
from kd_core.losses.fused.vocab_shard import ShardColumns, VocabStats
from kd_core.losses.sparse_view import SparseView


class ReducedLogits(NamedTuple):
    """Results of reducing a chunk's logits at one temperature."""

    view: SparseView
    tail_max: Float[Tensor, " n"]
    """The student's largest logit outside the support; −inf where nothing is outside."""
    entries: ShardColumns
    """Columns of the teacher's entries in this vocab shard."""
    labels: ShardColumns
    tail_share: Tensor | None
    """Share of the tail's mass in this vocab shard. None if the shard is the whole vocabulary."""
    has_tail_mean: bool
    """True if a term reads the view's `student_tail_mean`."""


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


def reduce_logits_(
    backend: LossBackend, chunk: Positions, mean_temperatures: Collection[float]
) -> dict[float, ReducedLogits]:
    """Reduces the logits / τ that the backend holds to a view for each temperature. The backend may overwrite them.

    Args:
        backend: the logits of the chunk.
        chunk: its targets.
        mean_temperatures: those at which a term reads `student_tail_mean`, which costs a pass over the vocabulary.
    """
    # Columns of the K entries and of the label in this shard.  [n, K] and [n, 1]
    head, teacher, used = backend.head, chunk.teacher, chunk.teacher.log_probs > -torch.inf
    entries = head.shard.locate(teacher.ids, used, len(head.weight))
    labels = head.shard.locate(chunk.labels[:, None], torch.ones_like(chunk.mask)[:, None], len(head.weight))
    by_temperature = backend.tail_statistics_(entries, labels, mean_temperatures)
    reduced: dict[float, ReducedLogits] = {}
    for temperature, shard_stats in by_temperature.items():
        # Statistics of the whole vocabulary, the same on all ranks.
        stats, tail_share = head.shard.all_reduce(shard_stats)
        has_mean = temperature in mean_temperatures
        view = _make_view(chunk, stats, has_mean)
        reduced[temperature] = ReducedLogits(view, stats.tail_max, entries, labels, tail_share, has_mean)
    return reduced


def _tail_mean(stats: VocabStats, normaliser: Tensor, has_tail_mean: bool) -> Tensor:
    if not has_tail_mean:
        return torch.zeros_like(normaliser)
    mean = stats.tail_sum / stats.tail_size.clamp(min=1)
    return torch.where(stats.tail_size > 0, mean - normaliser, 0.0)


def _make_view(chunk: Positions, stats: VocabStats, has_tail_mean: bool) -> SparseView:
    teacher, used = chunk.teacher, chunk.teacher.log_probs > -torch.inf
    # log Z = logaddexp(logsumexp over the distinct entries, logsumexp over the tail).  [n]
    support = torch.where(used, stats.entry_logits, -torch.inf)
    on_support = torch.where(stats.distinct, support, -torch.inf).logsumexp(dim=1)
    normaliser = torch.logaddexp(on_support, stats.tail_logsumexp)
    # log q = z / τ − log Z. Autograd is off here, so the fields that losses are differentiated by become its leaves.
    return SparseView(
        teacher_log_probs=teacher.log_probs,
        teacher_tail=teacher.tail_log_prob,
        tempered_tails=teacher.tempered_tails,
        student_log_probs=(support - normaliser[:, None]).requires_grad_(),
        student_logits=support,
        student_tail=(stats.tail_logsumexp - normaliser).requires_grad_(),
        student_tail_logit=stats.tail_logsumexp,
        student_label=(stats.label_logit - normaliser).requires_grad_(),
        student_log_normaliser=normaliser.requires_grad_(),
        student_tail_mean=_tail_mean(stats, normaliser.detach(), has_tail_mean).requires_grad_(),
        distinct=stats.distinct,
        is_label=stats.distinct & (teacher.ids == chunk.labels[:, None]),
        tail_size=stats.tail_size,
    )


def student_entropy(backend: LossBackend, reduced: ReducedLogits) -> Float[Tensor, " n"]:
    """Computes −Σ q log q over the whole vocabulary at temperature 1, in nats.

    It costs one more pass over the vocabulary, and an all-reduce where ranks share it.
    """
    view, tail_share = reduced.view, reduced.tail_share
    # Entropy of the softmax s over the tail. Over shards of share w, it is Σ w · (entropy − log w).  [n]
    tail_entropy = backend.tail_entropy()
    if tail_share is not None:
        tail_entropy = backend.head.shard.all_reduce_sum_(tail_share * tail_entropy + torch.special.entr(tail_share))
    # −Σ q log q over S, plus q(tail) · (tail entropy − log q(tail)).  [n]
    log_probs, tail = view.student_log_probs.detach(), view.student_tail.detach()
    on_support = -torch.where(view.distinct, log_probs.exp() * log_probs, 0.0).sum(dim=1)
    return on_support + tail.exp() * (tail_entropy - torch.where(view.tail_size > 0, tail, 0.0))


def logit_gradients(reduced: ReducedLogits, g: ViewGradients) -> LogitGradients:
    """Computes τ dL/dz by the formula at the head of this module."""
    view = reduced.view
    tail_exists = view.tail_size > 0
    # G = Σ g_k + g_tail + g_label + g_mean − g_Z.  [n]
    G = g.entries.sum(dim=1) + g.tail + g.label + g.tail_mean - g.log_normaliser
    # Support: g_k − G q_j. G q_j counts once per id, at its distinct entry.  [n, K]
    on_support = torch.where(view.distinct, G[:, None] * view.student_log_probs.detach().exp(), 0.0)
    entry_gradients = g.entries - on_support
    # Tail: (g_tail − G q(tail)) · s_j. The backend has s_j over this shard's tail, so its share makes it s_j of the
    # whole tail.  [n]
    tail_factor = torch.where(tail_exists, g.tail - G * view.student_tail.detach().exp(), 0.0)
    if reduced.tail_share is not None:
        tail_factor = tail_factor * reduced.tail_share
    # g_mean / n on the tail: the backend adds it to all columns, so it is taken off the support.  [n] and [n, K]
    tail_offset = None
    if reduced.has_tail_mean:
        tail_offset = g.tail_mean / view.tail_size.clamp(min=1)
        entry_gradients = entry_gradients - torch.where(view.distinct, tail_offset[:, None], 0.0)
    return LogitGradients(tail_factor, tail_offset, entry_gradients, g.label, reduced.entries, reduced.labels)
