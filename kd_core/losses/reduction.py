"""From logits to a sparse view, and from a loss's derivatives by that view to dL/dlogits: the closed form.

With q the softmax of z / τ, S the support and s_j = q_j / q(tail) the softmax over the tail alone, a loss of the
view's five student fields has derivatives g_k (entries), g_tail, g_label, g_Z (log Z) and g_mean. With
G = Σ g_k + g_tail + g_label + g_mean − g_Z and n the size of the tail,

    τ dL/dz_j = (g_tail − G q(tail)) · s_j + g_mean / n          for j outside S,
    τ dL/dz_j = Σ g_k over the entries k with id j − G q_j       for j in S,   and + g_label at the label.

So any loss costs one softmax over the tail, in place, and work on [n, K]. The tail's mass comes from its own
logsumexp, never from 1 − Σ q, which rounding destroys where the support holds nearly everything.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.losses.job import Positions
from kd_core.losses.view import SparseView

# Rows at a time where a pass over the vocabulary needs a second copy of them.
BLOCK_ROWS = 32


class Reduced(NamedTuple):
    """The view, and the student's largest logit outside the support (−inf where nothing is outside)."""

    view: SparseView
    largest_outside: Float[Tensor, " n"]


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


def _mark_support(logits: Tensor, ids: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids that `scatter_` may write for every entry, which entries are distinct, and which rows have any.

    Unused entries point at a used one's id. Each entry writes its column to the logit of its id; who reads back
    its own column is the one that stands for the id. The logits at the ids are lost.
    """
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    some = used.any(dim=1, keepdim=True)
    if not used.all():
        anchor = used.int().argmax(dim=1, keepdim=True)
        columns = torch.where(used, columns, anchor)
        ids = ids.gather(1, columns)
    marks = columns.to(logits.dtype)
    logits.scatter_(1, ids, marks)
    return ids, used & (logits.gather(1, ids) == marks), some


def reduce_(logits: Tensor, chunk: Positions, needs_tail_mean: bool) -> Reduced:
    """The view of logits / τ [n, V]; leaves the softmax over the tail in their place."""
    teacher, used = chunk.teacher, chunk.teacher.log_probs > -torch.inf
    gathered = logits.gather(1, teacher.ids)
    label = logits.gather(1, chunk.labels[:, None]).squeeze(1)
    ids, distinct, some = _mark_support(logits, teacher.ids, used)
    restored = gathered[:, :1]  # where no entry is used, what they all point at stays outside the support
    size = logits.shape[1] - distinct.sum(dim=1)
    mean = torch.zeros_like(label)
    if needs_tail_mean:
        logits.scatter_(1, ids, torch.where(some, 0.0, restored).expand_as(ids))
        mean = logits.sum(dim=1) / size.clamp(min=1)
    logits.scatter_(1, ids, torch.where(some, -torch.inf, restored).expand_as(ids))
    largest = logits.amax(dim=1)
    tail = largest - torch.softmax(logits, dim=1, out=logits).amax(dim=1).log()
    exists = size > 0
    if not exists.all():
        logits.masked_fill_(~exists[:, None], 0.0)
        tail = torch.where(exists, tail, -torch.inf)
    support = torch.where(used, gathered, -torch.inf)
    on_support = torch.where(distinct, support, -torch.inf).logsumexp(dim=1)
    normaliser = torch.logaddexp(on_support, tail)
    view = SparseView(
        teacher_log_probs=teacher.log_probs,
        teacher_tail=teacher.tail_log_prob,
        tempered_tails=teacher.tempered_tails,
        student_log_probs=(support - normaliser[:, None]).requires_grad_(),
        student_logits=support,
        student_tail=(tail - normaliser).requires_grad_(),
        student_tail_logit=tail,
        student_label=(label - normaliser).requires_grad_(),
        student_log_normaliser=normaliser.requires_grad_(),
        student_tail_mean=torch.where(exists & needs_tail_mean, mean - normaliser.detach(), 0.0).requires_grad_(),
        distinct=distinct,
        is_label=distinct & (teacher.ids == chunk.labels[:, None]),
        tail_size=size,
    )
    return Reduced(view, largest)


def student_entropy(tail_softmax: Tensor, view: SparseView) -> Float[Tensor, " n"]:
    """−Σ q log q over the whole vocabulary, in nats; one more pass over it."""
    inside = torch.cat([torch.special.entr(rows).sum(dim=1) for rows in tail_softmax.split(BLOCK_ROWS)])
    log_probs, tail = view.student_log_probs.detach(), view.student_tail.detach()
    on_support = -torch.where(view.distinct, log_probs.exp() * log_probs, 0.0).sum(dim=1)
    return on_support + tail.exp() * (inside - torch.where(view.tail_size > 0, tail, 0.0))


def write_gradient_(tail_softmax: Tensor, chunk: Positions, view: SparseView, g: Gradients) -> None:
    """Turn the tail's softmax [n, V] into τ dL/dz. Sparse entries are added last, as float32 differences."""
    total = g.entries.sum(dim=1) + g.tail + g.label + g.tail_mean - g.log_normaliser
    entries = g.entries - torch.where(view.distinct, total[:, None] * view.student_log_probs.detach().exp(), 0.0)
    tail_softmax.mul_((g.tail - total * view.student_tail.detach().exp())[:, None])
    if g.tail_mean.any():
        each = g.tail_mean / view.tail_size.clamp(min=1)
        tail_softmax.add_(each[:, None])
        entries = entries - torch.where(view.distinct, each[:, None], 0.0)
    tail_softmax.scatter_add_(1, chunk.teacher.ids, torch.where(view.used(), entries, 0.0))
    tail_softmax.scatter_add_(1, chunk.labels[:, None], g.label[:, None])
