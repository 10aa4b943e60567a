"""The inputs of every loss: teacher and student at n positions, on the teacher's K entries, the tail and the label.

SparseView    log-probabilities of both sides, made by the fused passes (`fused/softmax.py`, `fused/topk_only.py`)
Events        what a tail treatment makes of a view (`tails.py`), and what a divergence compares (`divergences.py`)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def _with_gradient_of(log_probs: Tensor, values: Tensor, used: Tensor) -> Tensor:
    """Returns `values` with the gradient of `log_probs`. Both are 0 where `used` is false."""
    # x − detach(x) has the value 0 and the gradient of x.
    return torch.where(used, log_probs - log_probs.detach(), 0.0) + torch.where(used, values, 0.0)


class SparseView(NamedTuple):
    """Teacher and student at n positions, in nats.

    The support S of a position is the set of ids of its used entries. The tail is every other real token.
    The student's fields are at one temperature τ, so q is the softmax of logits / τ. Losses are differentiated by
    the five fields that `differentiable_fields` returns.
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
        """Returns a mask of the entries that exist. Positions with fewer than K entries are filled up with −inf."""
        return self.teacher_log_probs > -torch.inf

    def student_relative(self) -> Float[Tensor, "n K"]:
        """Returns log q up to a constant per row, at full precision and with the gradient of log q.

        Losses that renormalise it cancel the constant. log q itself loses digits where it is as low as −1e4.
        """
        return _with_gradient_of(self.student_log_probs, self.student_logits, self.used())

    def tail_relative(self) -> Float[Tensor, " n"]:
        """Returns log of the student's tail mass, up to the same constant as `student_relative`."""
        return _with_gradient_of(self.student_tail, self.student_tail_logit, self.tail_size > 0)

    def differentiable_fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns the fields that carry a gradient, in the order of `ViewGradients`."""
        return (
            self.student_log_probs,
            self.student_tail,
            self.student_label,
            self.student_log_normaliser,
            self.student_tail_mean,
        )


class Events(NamedTuple):
    """Log-probabilities of the E events that a divergence compares. Both sides are 0 where an event is not used."""

    teacher: Float[Tensor, "n E"]
    student: Float[Tensor, "n E"]
    used: Bool[Tensor, "n E"]
    student_relative: Callable[[], Tensor] | None = None
    """Computes `SparseView.student_relative` [n, E], where the events are the entries as they are and the tail."""

    def teacher_probs(self) -> Float[Tensor, "n E"]:
        """Returns p of each event, and 0 where it is not used."""
        return torch.where(self.used, self.teacher.exp(), 0.0)

    def student_probs(self) -> Float[Tensor, "n E"]:
        """Returns q of each event, and 0 where it is not used."""
        return torch.where(self.used, self.student.exp(), 0.0)

    def log_ratio(self) -> Float[Tensor, "n E"]:
        """Returns log p − log q of each event, and 0 where it is not used."""
        return self.teacher - self.student


def make_events(teacher: Tensor, student: Tensor, used: Tensor, relative: Callable[[], Tensor] | None = None) -> Events:
    """Builds events whose unused ones are 0 in value and in gradient."""
    # `where` also stops the gradient of an unused event: −inf − −inf would make it NaN.  [n, E]
    return Events(torch.where(used, teacher, 0.0), torch.where(used, student, 0.0), used, relative)


def log_softmax_over(values: Tensor, used: Tensor) -> Tensor:
    """Returns the log-softmax over the used entries of each row, and 0 for all other entries."""
    row_has_any = used.any(dim=1, keepdim=True)
    # −inf removes an entry from the normaliser.  [n, E]
    masked = torch.where(used, values, -torch.inf)
    # A row of nothing but −inf would give NaN, also in the gradient: it becomes a row of 0 first.
    return torch.where(used, torch.where(row_has_any, masked, 0.0).log_softmax(dim=1), 0.0)
