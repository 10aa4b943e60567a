"""Which positions a term scores: the most uncertain share of them (SE-KD, arXiv 2602.01395)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.ranges import SHARE_ABOVE_0, check_ranges
from kd_core.types import TeacherTopK

SIGNALS = ("student_entropy", "teacher_entropy")


@dataclass(frozen=True)
class KeepUncertain:
    """Score the `share` of positions where `signal` is largest; the others count 0.

    `student_entropy` is SE-KD's own choice (at a share of 0.2). It needs the logits of all positions before any
    loss is known, so it costs one more pass through the head: a third more time. `teacher_entropy`, over the
    entries and the tail as one event, is free. The pool is what one call of the loss sees (a micro-batch of one
    rank), so the choice depends on how a step is split. Kept positions count scored / kept times, so that the
    term stays a mean over the kept ones once it is divided by all scored positions.
    """

    share: float
    signal: str = "student_entropy"

    def __post_init__(self) -> None:
        check_ranges(self, "loss: KeepUncertain.", share=SHARE_ABOVE_0)
        if self.signal not in SIGNALS:
            raise UsageError(f"loss: KeepUncertain.signal {self.signal!r} is unknown; wanted one of {SIGNALS}.")

    def weights(self, uncertainty: Float[Tensor, " N"], mask: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Factor of each position: 0, or scored / kept. Of equal positions the first is kept."""
        scored = int(mask.sum())
        kept = math.ceil(self.share * scored)
        order = torch.where(mask, uncertainty, -torch.inf).argsort(descending=True, stable=True)
        weights = torch.zeros_like(uncertainty)
        weights[order[:kept]] = scored / max(1, kept)
        return weights


def teacher_entropy(teacher: TeacherTopK) -> Float[Tensor, " N"]:
    """−Σ p log p over the entries and the tail as one event, in nats: a lower bound of the teacher's entropy."""
    logs = torch.cat([teacher.log_probs, teacher.tail_log_prob[:, None]], dim=1)
    return -torch.where(logs > -torch.inf, logs.exp() * logs, 0.0).sum(dim=1)
