"""Numbers about teacher and student that fall out of the pass over the vocabulary: sums over scored positions."""

import torch
from torch import Tensor

from kd_core.losses.reduction import Reduced
from kd_core.losses.selection import teacher_entropy
from kd_core.losses.view import SparseView
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
