"""Numbers about teacher and student that fall out of the pass over the vocabulary: sums over scored positions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kd_core.losses import calibration
from kd_core.losses.fused.softmax import Reduced, student_entropy
from kd_core.losses.fused.vocab_shard import Part
from kd_core.losses.sparse_view import SparseView
from kd_core.losses.token_selection import teacher_entropy
from kd_core.types import TeacherTopK


def _sums(each: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    return {name: torch.where(mask, value, 0).sum() for name, value in each.items()}


def observe_teacher(view: SparseView, mask: Tensor) -> dict[str, Tensor]:
    """What a step logs beside its losses, of the teacher alone:

    teacher_mass                 probability on the support
    teacher_entropy              −Σ p log p over the entries and the tail as one event, in nats (a lower bound)
    label_in_support             the label is one of the teacher's entries
    """
    entries = TeacherTopK(view.distinct.long(), view.teacher_log_probs, view.teacher_tail)
    each = {
        "teacher_mass": torch.where(view.used(), view.teacher_log_probs.exp(), 0.0).sum(dim=1),
        "teacher_entropy": teacher_entropy(entries),
        "label_in_support": view.is_label.any(dim=1),
    }
    return _sums(each, mask)


def observe(reduced: Reduced, mask: Tensor) -> dict[str, Tensor]:
    """The teacher's numbers, and of the student at temperature 1:

    student_mass                 probability on the support
    top1_agreement               the student's likeliest token is the teacher's likeliest entry
    topk_agreement               the student's likeliest token is one of the teacher's entries
    acceptance                   Σ min(p, q) over the entries: what a speculative decoder accepts (a lower bound)
    """
    view, outside = reduced.view, reduced.largest_outside
    student = view.student_log_probs.detach()
    p, q = view.teacher_log_probs.exp(), student.exp()
    favourite = view.teacher_log_probs.argmax(dim=1, keepdim=True)
    # Logits are compared through log q, whose common normaliser does not change the order.
    best, of_favourite = student.amax(dim=1), student.gather(1, favourite).squeeze(1)
    best_outside = outside - view.student_log_normaliser.detach()
    inside = best > best_outside
    each = {
        "student_mass": torch.where(view.distinct, q, 0.0).sum(dim=1),
        "top1_agreement": inside & (of_favourite >= best),
        "topk_agreement": inside,
        "acceptance": torch.where(view.distinct, torch.minimum(p, q), 0.0).sum(dim=1),
    }
    return observe_teacher(view, mask) | _sums(each, mask)


class Reduction(NamedTuple):
    """A chunk as the pass over the vocabulary has left it: its numbers, its softmax over the tail, what is scored."""

    reduced: Reduced
    tail_softmax: Tensor
    part: Part
    mask: Tensor

    def log_best(self) -> Tensor:
        """log q of the student's likeliest token."""
        view = self.reduced.view
        outside = self.reduced.largest_outside - view.student_log_normaliser.detach()
        return torch.maximum(view.student_log_probs.detach().amax(dim=1), outside)


def _entropy(of: Reduction) -> dict[str, Tensor]:
    return _sums({"student_entropy": student_entropy(of.tail_softmax, of.reduced, of.part)}, of.mask)


def _top5_agreement(of: Reduction) -> dict[str, Tensor]:
    """The student's likeliest token is one of the teacher's five likeliest entries (of all, where there are fewer)."""
    view = of.reduced.view
    five = view.teacher_log_probs.topk(min(5, view.teacher_log_probs.shape[1]), dim=1).indices
    among = view.student_log_probs.detach().gather(1, five).amax(dim=1)
    return _sums({"top5_agreement": among >= of.log_best()}, of.mask)


def _calibration(of: Reduction) -> dict[str, Tensor]:
    best = of.log_best()
    return calibration.gap_sums(best, of.reduced.view.student_label.detach() >= best, of.mask)


def _temperature(of: Reduction) -> dict[str, Tensor]:
    view, share = of.reduced.view, of.reduced.share
    inverse = torch.tensor(calibration.EIGHTHS, device=of.mask.device) / 8
    powers = calibration.power_sums(of.tail_softmax)
    if share is not None:
        powers = of.part.sum_(powers * share[:, None] ** inverse)
    tail = torch.where(view.tail_size > 0, view.student_tail.detach(), 0.0)[:, None] * inverse + powers.log()
    entries = torch.where(view.distinct, view.student_log_probs.detach(), -torch.inf)
    return calibration.nll_at_temperatures(entries, tail, view.student_label.detach(), of.mask)


FURTHER: dict[str, Callable[[Reduction], dict[str, Tensor]]] = {
    "student_entropy": _entropy,
    "top5_agreement": _top5_agreement,
    "calibration": _calibration,
    "temperature": _temperature,
}


def observe_further(
    names: tuple[str, ...], reduced: Reduced, tail_softmax: Tensor, part: Part, mask: Tensor
) -> dict[str, Tensor]:
    """What an objective asks for in `observe`: each costs some pass over the vocabulary, or a sort of the entries."""
    of = Reduction(reduced, tail_softmax, part, mask)
    return {name: value for asked in names for name, value in FURTHER[asked](of).items()}
