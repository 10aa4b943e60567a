"""Divergences and tail treatments as pure functions: the one place where a formula of the family is written.

A tail treatment turns teacher and student at n positions into log-probabilities of E events; a divergence turns
those into nats. Entries that are not used have teacher log-probability −inf and contribute exactly 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class SparseView(NamedTuple):
    """Teacher and student at n positions, seen through the teacher's K entries, the tail and the label."""

    teacher_log_probs: Float[Tensor, "n K"]
    teacher_tail: Float[Tensor, " n"]
    student_log_probs: Float[Tensor, "n K"]
    student_tail: Float[Tensor, " n"]
    student_label: Float[Tensor, " n"]

    def used(self) -> Bool[Tensor, "n K"]:
        """Which of the K entries are real."""
        return self.teacher_log_probs > -torch.inf


class Events(NamedTuple):
    """Log-probabilities of the E events that a divergence compares; student values are finite where unused."""

    teacher: Float[Tensor, "n E"]
    student: Float[Tensor, "n E"]


def _finite_student(view: SparseView) -> Tensor:
    return torch.where(view.used(), view.student_log_probs, 0.0)


def tail_bucket(view: SparseView) -> Events:
    """K + 1 events: each entry, and everything else as one (the ghost token). A lower bound of the full divergence."""
    student_tail = torch.where(view.teacher_tail > -torch.inf, view.student_tail, 0.0)
    return Events(
        torch.cat([view.teacher_log_probs, view.teacher_tail[:, None]], dim=1),
        torch.cat([_finite_student(view), student_tail[:, None]], dim=1),
    )


def renormalized(view: SparseView) -> Events:
    """K events, both sides renormalised on them: blind to everything outside (NeMo-Aligner, NeMo-RL, ModelOpt)."""
    mass = torch.where(view.used(), view.student_log_probs, -torch.inf).logsumexp(dim=1, keepdim=True)
    teacher = view.teacher_log_probs - view.teacher_log_probs.logsumexp(dim=1, keepdim=True)
    return Events(teacher, torch.where(view.used(), view.student_log_probs - mass, 0.0))


def truncated(view: SparseView) -> Events:
    """K events, the teacher renormalised, the student not (DistillKit "zero", Axolotl): biased, never 0 gradient."""
    teacher = view.teacher_log_probs - view.teacher_log_probs.logsumexp(dim=1, keepdim=True)
    return Events(teacher, _finite_student(view))


def unnormalized(view: SparseView) -> Events:
    """K events of true probability and no tail (verl): the sum can go negative."""
    return Events(view.teacher_log_probs, _finite_student(view))


def forward_kl(events: Events) -> Float[Tensor, " n"]:
    """KL(teacher‖student) = Σ p (log p − log q), in nats."""
    teacher = torch.where(events.teacher > -torch.inf, events.teacher, 0.0)
    terms = events.teacher.exp() * (teacher - events.student)
    return terms.sum(dim=1)


TAILS: dict[str, Callable[[SparseView], Events]] = {
    "tail_bucket": tail_bucket,
    "renormalized": renormalized,
    "truncated": truncated,
    "unnormalized": unnormalized,
}
DIVERGENCES: dict[str, Callable[[Events], Tensor]] = {"forward_kl": forward_kl}
