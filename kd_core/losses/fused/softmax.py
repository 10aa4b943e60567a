"""From logits to a sparse view, and from a loss's derivatives by that view to dL/dlogits: the closed form.

With q the softmax of z / τ, S the support and s_j = q_j / q(tail) the softmax over the tail alone, a loss of the
view's five student fields has derivatives g_k (entries), g_tail, g_label, g_Z (log Z) and g_mean. With
G = Σ g_k + g_tail + g_label + g_mean − g_Z and n the size of the tail,

    τ dL/dz_j = (g_tail − G q(tail)) · s_j + g_mean / n          for j outside S,
    τ dL/dz_j = Σ g_k over the entries k with id j − G q_j       for j in S,   and + g_label at the label.

So any loss costs one softmax over the tail, in place, and work on [n, K]. The tail's mass comes from its own
logsumexp, never from 1 − Σ q, which rounding destroys where the support holds nearly everything. Where ranks share
the vocabulary (`part.py`), each does this on its own columns, with numbers of each position that all ranks agree on.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.losses.fused.chunks import Positions
from kd_core.losses.fused.vocab_shard import Found, Located, Part, nothing_found
from kd_core.losses.sparse_view import SparseView

# Rows at a time where a pass over the vocabulary needs a second copy of them.
BLOCK_ROWS = 32


class Reduced(NamedTuple):
    """A chunk after the pass over its logits."""

    view: SparseView
    largest_outside: Float[Tensor, " n"]
    """The student's largest logit outside the support; −inf where nothing is outside."""
    entries: Located
    """Where the teacher's entries are among this part's columns."""
    labels: Located
    share: Tensor | None
    """Of the tail's mass, what this part's columns have; None where they are all columns."""


class Gradients(NamedTuple):
    """d(scale · loss) by the view's student fields, in the order of `SparseView.student_leaves`."""

    entries: Float[Tensor, "n K"]
    tail: Float[Tensor, " n"]
    label: Float[Tensor, " n"]
    log_normaliser: Float[Tensor, " n"]
    tail_mean: Float[Tensor, " n"]

    @classmethod
    def of(cls, loss: Tensor, scale: float, views: list[SparseView]) -> "list[Gradients]":
        """By each of the views."""
        leaves = [leaf for view in views for leaf in view.student_leaves()]
        with torch.enable_grad():  # a gradient to start from would have torch import sympy: 40 MiB
            scaled = loss * scale
        found = torch.autograd.grad(scaled, leaves, allow_unused=True, materialize_grads=True)
        return [cls(*found[at : at + 5]) for at in range(0, len(found), 5)]


def _mark_support(logits: Tensor, at: Located) -> tuple[Tensor, Tensor, Tensor]:
    """Columns that `scatter_` may write for every entry, which entries are distinct, and which rows have any.

    Entries that are not here point at one that is. Each entry writes its number to the logit of its id; who reads
    back its own number is the one that stands for the id. The logits at the ids are lost.
    """
    numbers, (columns, own) = torch.arange(at.columns.shape[1], device=logits.device).expand_as(at.columns), at
    some = own.any(dim=1, keepdim=True)
    if not own.all():
        anchor = own.int().argmax(dim=1, keepdim=True)
        numbers = torch.where(own, numbers, anchor)
        columns = columns.gather(1, numbers)
    marks = numbers.to(logits.dtype)
    logits.scatter_(1, columns, marks)
    return columns, own & (logits.gather(1, columns) == marks), some


def _soften_tail_(logits: Tensor, at: Located, labels: Located, needs_tail_sum: bool) -> Found:
    """What a part knows of logits / τ; leaves the softmax over its tail in their place."""
    gathered = logits.gather(1, at.columns)
    label = logits.gather(1, labels.columns).squeeze(1)
    columns, distinct, some = _mark_support(logits, at)
    restored = gathered[:, :1]  # where no entry is here, what they all point at stays outside the support
    size = logits.shape[1] - distinct.sum(dim=1)
    tail_sum = torch.zeros_like(label)
    if needs_tail_sum:
        logits.scatter_(1, columns, torch.where(some, 0.0, restored).expand_as(columns))
        tail_sum = logits.sum(dim=1)
    logits.scatter_(1, columns, torch.where(some, -torch.inf, restored).expand_as(columns))
    largest = logits.amax(dim=1)
    tail = largest - torch.softmax(logits, dim=1, out=logits).amax(dim=1).log()
    exists = size > 0
    if not exists.all():
        logits.masked_fill_(~exists[:, None], 0.0)
        tail = torch.where(exists, tail, -torch.inf)
    logits_here = torch.where(at.own, gathered, 0.0)
    return Found(logits_here, distinct, torch.where(labels.own.squeeze(1), label, 0.0), tail_sum, size, largest, tail)


def reduce_(logits: Tensor, chunk: Positions, part: Part, needs_tail_mean: bool) -> Reduced:
    """The view of logits / τ [n, V]; leaves the softmax over the tail in their place."""
    teacher, used, V = chunk.teacher, chunk.teacher.log_probs > -torch.inf, logits.shape[1]
    entries = part.locate(teacher.ids, used, V)
    labels = part.locate(chunk.labels[:, None], torch.ones_like(chunk.mask)[:, None], V)
    here = nothing_found(logits.zero_(), used.shape[1]) if part.padding else None
    found, share = part.together(here or _soften_tail_(logits, entries, labels, needs_tail_mean))
    exists = found.tail_size > 0
    mean = found.tail_sum / found.tail_size.clamp(min=1)
    support = torch.where(used, found.logits, -torch.inf)
    on_support = torch.where(found.distinct, support, -torch.inf).logsumexp(dim=1)
    normaliser = torch.logaddexp(on_support, found.tail)
    view = SparseView(
        teacher_log_probs=teacher.log_probs,
        teacher_tail=teacher.tail_log_prob,
        tempered_tails=teacher.tempered_tails,
        student_log_probs=(support - normaliser[:, None]).requires_grad_(),
        student_logits=support,
        student_tail=(found.tail - normaliser).requires_grad_(),
        student_tail_logit=found.tail,
        student_label=(found.label - normaliser).requires_grad_(),
        student_log_normaliser=normaliser.requires_grad_(),
        student_tail_mean=torch.where(exists & needs_tail_mean, mean - normaliser.detach(), 0.0).requires_grad_(),
        distinct=found.distinct,
        is_label=found.distinct & (teacher.ids == chunk.labels[:, None]),
        tail_size=found.tail_size,
    )
    return Reduced(view, found.largest, entries, labels, share)


def student_entropy(tail_softmax: Tensor, reduced: Reduced, part: Part) -> Float[Tensor, " n"]:
    """−Σ q log q over the whole vocabulary, in nats; one more pass over it (and a reduction, where ranks share it)."""
    view, share = reduced.view, reduced.share
    inside = torch.cat([torch.special.entr(rows).sum(dim=1) for rows in tail_softmax.split(BLOCK_ROWS)])
    if share is not None:
        inside = part.sum_(share * inside + torch.special.entr(share))
    log_probs, tail = view.student_log_probs.detach(), view.student_tail.detach()
    on_support = -torch.where(view.distinct, log_probs.exp() * log_probs, 0.0).sum(dim=1)
    return on_support + tail.exp() * (inside - torch.where(view.tail_size > 0, tail, 0.0))


def write_gradient_(tail_softmax: Tensor, reduced: Reduced, g: Gradients) -> None:
    """Turn the tail's softmax [n, V] into τ dL/dz. Sparse entries are added last, as float32 differences."""
    view, at, labels = reduced.view, reduced.entries, reduced.labels
    total = g.entries.sum(dim=1) + g.tail + g.label + g.tail_mean - g.log_normaliser
    entries = g.entries - torch.where(view.distinct, total[:, None] * view.student_log_probs.detach().exp(), 0.0)
    of_tail = g.tail - total * view.student_tail.detach().exp()
    tail_softmax.mul_((of_tail if reduced.share is None else of_tail * reduced.share)[:, None])
    if g.tail_mean.any():
        each = g.tail_mean / view.tail_size.clamp(min=1)
        tail_softmax.add_(each[:, None])
        entries = entries - torch.where(view.distinct, each[:, None], 0.0)
    tail_softmax.scatter_add_(1, at.columns, torch.where(at.own, entries, 0.0))
    tail_softmax.scatter_add_(1, labels.columns, torch.where(labels.own, g.label[:, None], 0.0))
