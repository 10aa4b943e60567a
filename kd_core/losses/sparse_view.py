"""What a loss sees of teacher and student: n positions through the teacher's K entries, the tail and the label."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def _as_differentiated(log_probs: Tensor, values: Tensor, used: Tensor) -> Tensor:
    """The values, with the gradient of log-probabilities; 0 where they are not used."""
    return torch.where(used, log_probs - log_probs.detach(), 0.0) + torch.where(used, values, 0.0)


class SparseView(NamedTuple):
    """Teacher and student at n positions, in nats. A loss is differentiated by the five student fields.

    The support S of a position is the set of its used entries' ids; the tail is every other real token. The
    student's fields are at one temperature τ, so q is the softmax of logits / τ.
    """

    teacher_log_probs: Float[Tensor, "n K"]
    """log p of each entry; −inf where it is not used."""
    teacher_tail: Float[Tensor, " n"]
    """log of the teacher's mass on the tail."""
    tempered_tails: tuple[tuple[float, Float[Tensor, " n"]], ...]
    """As in `TeacherTopK`."""
    student_log_probs: Float[Tensor, "n K"]
    """log q of each entry; −inf where it is not used."""
    student_logits: Float[Tensor, "n K"]
    """Logit / τ of each entry, without a gradient: exact also where log q is −1e4; −inf where it is not used."""
    student_tail: Float[Tensor, " n"]
    """log of the student's mass on the tail; −inf where the support is the whole vocabulary."""
    student_tail_logit: Float[Tensor, " n"]
    """logsumexp of the tail's logits / τ, without a gradient; −inf where there are none."""
    student_label: Float[Tensor, " n"]
    """log q of the label."""
    student_log_normaliser: Float[Tensor, " n"]
    """logsumexp of the logits / τ over the real vocabulary."""
    student_tail_mean: Float[Tensor, " n"]
    """Mean of log q over the tail's tokens; 0 where there are none, or where no term asked for it."""
    distinct: Bool[Tensor, "n K"]
    """One used entry for each id of the support: the others repeat it."""
    is_label: Bool[Tensor, "n K"]
    """The distinct entry whose id is the label, where there is one."""
    tail_size: Int[Tensor, " n"]
    """How many tokens the tail has."""

    def used(self) -> Bool[Tensor, "n K"]:
        """Which of the K entries are real."""
        return self.teacher_log_probs > -torch.inf

    def student_relative(self) -> Float[Tensor, "n K"]:
        """log q up to a number of each row, at full precision, for what renormalises it; gradient as log q has it."""
        return _as_differentiated(self.student_log_probs, self.student_logits, self.used())

    def tail_relative(self) -> Float[Tensor, " n"]:
        """The same of the tail, up to the same number."""
        return _as_differentiated(self.student_tail, self.student_tail_logit, self.tail_size > 0)

    def student_leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What a loss is differentiated by, in the order of `Gradients`."""
        return (
            self.student_log_probs,
            self.student_tail,
            self.student_label,
            self.student_log_normaliser,
            self.student_tail_mean,
        )


class Events(NamedTuple):
    """Log-probabilities of the E events that a divergence compares; both are 0 where an event is not used."""

    teacher: Float[Tensor, "n E"]
    student: Float[Tensor, "n E"]
    used: Bool[Tensor, "n E"]
    student_relative: Float[Tensor, "n E"] | None = None
    """As in `SparseView`, where the events are the entries as they are and the tail."""

    def teacher_probs(self) -> Float[Tensor, "n E"]:
        """P of each event; 0 where it is not used."""
        return torch.where(self.used, self.teacher.exp(), 0.0)

    def student_probs(self) -> Float[Tensor, "n E"]:
        """Q of each event; 0 where it is not used."""
        return torch.where(self.used, self.student.exp(), 0.0)

    def log_ratio(self) -> Float[Tensor, "n E"]:
        """log p − log q of each event; 0 where it is not used."""
        return self.teacher - self.student


def events(teacher: Tensor, student: Tensor, used: Tensor, relative: Tensor | None = None) -> Events:
    """Events with unused ones silenced, in value and in gradient."""
    return Events(torch.where(used, teacher, 0.0), torch.where(used, student, 0.0), used, relative)


def log_softmax_over(values: Tensor, used: Tensor) -> Tensor:
    """Log-softmax over the used entries of each row; 0 elsewhere, and in rows without any."""
    some = used.any(dim=1, keepdim=True)
    silenced = torch.where(used, values, -torch.inf)
    return torch.where(used, torch.where(some, silenced, 0.0).log_softmax(dim=1), 0.0)
