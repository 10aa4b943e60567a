"""Metrics of teacher and student from the pass over the vocabulary, as sums over scored positions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kd_core.losses import calibration
from kd_core.losses.fused.backend import LossBackend
from kd_core.losses.fused.softmax import ReducedLogits, student_entropy
from kd_core.losses.sparse_view import SparseView
from kd_core.losses.token_selection import teacher_entropy
from kd_core.types import TeacherTopK


def _masked_sums(metrics: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    # All metrics at once: each operation is a launch on a GPU.  [metrics, n] → [metrics]
    stacked = torch.stack(list(metrics.values()))
    return dict(zip(metrics, torch.where(mask, stacked, 0).sum(dim=1).unbind(), strict=True))


def teacher_metric_sums(view: SparseView, mask: Tensor) -> dict[str, Tensor]:
    """Computes the metrics of a step that depend on the teacher alone.

    teacher_mass                 probability on the support
    teacher_entropy              −Σ p log p over the entries and the tail as one event, in nats (a lower bound)
    label_in_support             the label is one of the teacher's entries
    """
    # `teacher_entropy` reads no ids, so any tensor of the right shape will do.
    entries = TeacherTopK(view.distinct.long(), view.teacher_log_probs, view.teacher_tail)
    metrics = {
        "teacher_mass": torch.where(view.used(), view.teacher_log_probs.exp(), 0.0).sum(dim=1),
        "teacher_entropy": teacher_entropy(entries),
        "label_in_support": view.is_label.any(dim=1),
    }
    return _masked_sums(metrics, mask)


def metric_sums(reduced: ReducedLogits, mask: Tensor) -> dict[str, Tensor]:
    """Computes the metrics of a step: the teacher's, and these of the student at temperature 1.

    student_mass                 probability on the support
    top1_agreement               the student's likeliest token is the teacher's likeliest entry
    topk_agreement               the student's likeliest token is one of the teacher's entries
    acceptance                   Σ min(p, q) over the entries: what a speculative decoder accepts (a lower bound)
    """
    # p and q of the entries, and the teacher's likeliest entry.  [n, K] and [n, 1]
    view, tail_max = reduced.view, reduced.tail_max
    student = view.student_log_probs.detach()
    p, q = view.teacher_log_probs.exp(), student.exp()
    teacher_top1 = view.teacher_log_probs.argmax(dim=1, keepdim=True)
    # The student's largest log q on the support, at the teacher's likeliest entry, and on the tail. Subtracting
    # log Z from all logits does not change their order.  [n]
    best_on_support, at_teacher_top1 = student.amax(dim=1), student.gather(1, teacher_top1).squeeze(1)
    best_on_tail = tail_max - view.student_log_normaliser.detach()
    support_wins = best_on_support > best_on_tail
    metrics = {
        "student_mass": torch.where(view.distinct, q, 0.0).sum(dim=1),
        "top1_agreement": support_wins & (at_teacher_top1 >= best_on_support),
        "topk_agreement": support_wins,
        "acceptance": torch.where(view.distinct, torch.minimum(p, q), 0.0).sum(dim=1),
    }
    return teacher_metric_sums(view, mask) | _masked_sums(metrics, mask)


class ReducedChunk(NamedTuple):
    """A chunk after the pass over its logits, as the metrics of `EXTRA_METRICS` read it."""

    reduced: ReducedLogits
    backend: LossBackend
    mask: Tensor

    def log_best(self) -> Tensor:
        """Returns log q of the student's likeliest token [n]."""
        view = self.reduced.view
        best_on_tail = self.reduced.tail_max - view.student_log_normaliser.detach()
        return torch.maximum(view.student_log_probs.detach().amax(dim=1), best_on_tail)


def _student_entropy(chunk: ReducedChunk) -> dict[str, Tensor]:
    return _masked_sums({"student_entropy": student_entropy(chunk.backend, chunk.reduced)}, chunk.mask)


def _top5_agreement(chunk: ReducedChunk) -> dict[str, Tensor]:
    """Counts where the student's likeliest token is one of the teacher's five likeliest entries, or of all if K < 5.

    Caches round entries, so that the fifth is often as likely as the next ones. All of these count.
    """
    # The student's largest log q on these entries, against that of its likeliest token.  [n, 1] and [n, K] → [n]
    view = chunk.reduced.view
    fifth = view.teacher_log_probs.topk(min(5, view.teacher_log_probs.shape[1]), dim=1).values[:, -1:]
    is_top5 = view.teacher_log_probs >= fifth
    best_on_top5 = view.student_log_probs.detach().where(is_top5, -torch.inf).amax(dim=1)
    return _masked_sums({"top5_agreement": best_on_top5 >= chunk.log_best()}, chunk.mask)


def _calibration(chunk: ReducedChunk) -> dict[str, Tensor]:
    # The student is right where no token is likelier than the label.
    log_best = chunk.log_best()
    return calibration.gap_sums(log_best, chunk.reduced.view.student_label.detach() >= log_best, chunk.mask)


def _temperature(chunk: ReducedChunk) -> dict[str, Tensor]:
    view, tail_share = chunk.reduced.view, chunk.reduced.tail_share
    first, *_, last = calibration.EIGHTHS
    inverse = torch.arange(first, last + 1, device=chunk.mask.device) / 8
    # Σ s^(1/τ) over the tail, s the softmax over it. A shard has s / share, so s^(1/τ) takes share^(1/τ), and shards
    # add up.  [n, temperatures]
    power_sums = chunk.backend.tail_power_sums()
    if tail_share is not None:
        power_sums = chunk.backend.head.shard.all_reduce_sum_(power_sums * tail_share[:, None] ** inverse)
    # log Σ q^(1/τ) over the tail = log q(tail) / τ + log Σ s^(1/τ), since q = q(tail) · s.  [n, temperatures]
    tail = view.student_tail.detach()[:, None] * inverse + power_sums.log()
    entries = torch.where(view.distinct, view.student_log_probs.detach(), -torch.inf)
    return calibration.nll_at_temperatures(entries, tail, view.student_label.detach(), chunk.mask)


EXTRA_METRICS: dict[str, Callable[[ReducedChunk], dict[str, Tensor]]] = {
    "student_entropy": _student_entropy,
    "top5_agreement": _top5_agreement,
    "ece": _calibration,
    "temperature": _temperature,
}


def extra_metric_sums(
    names: tuple[str, ...], reduced: ReducedLogits, backend: LossBackend, mask: Tensor
) -> dict[str, Tensor]:
    """Computes the metrics that `Objective.observe` names.

    Each costs another pass over the vocabulary, or a sort of the entries.
    """
    chunk = ReducedChunk(reduced, backend, mask)
    return {name: value for metric in names for name, value in EXTRA_METRICS[metric](chunk).items()}
