"""Selection of the positions that a term scores: the most uncertain share of them (SE-KD, arXiv 2602.01395)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kd_core.ranges import SHARE_ABOVE_0, check_settings
from kd_core.types import TeacherTopK


@dataclass(frozen=True)
class KeepUncertain:
    """A rule that scores the `share` of positions where `signal` is largest. All other positions have weight 0.

    `student_entropy` is the choice of SE-KD, at a share of 0.2. It needs the logits of all positions before the first
    loss, so it costs one more pass through the lm_head: a third more time. `teacher_entropy`, over the entries and the
    tail as one event, is free.

    Positions are selected among those of one call of the loss, a micro-batch of one rank. So the selection depends on
    how a step is split. Selected positions have the weight scored / selected. The term is then still a mean over the
    selected ones once it is divided by all scored positions.
    """

    share: float
    signal: Literal["student_entropy", "teacher_entropy"] = "student_entropy"

    def __post_init__(self) -> None:
        check_settings(self, "loss: KeepUncertain.", share=SHARE_ABOVE_0)

    def weights(self, uncertainty: Float[Tensor, " N"], mask: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Returns the factor of each position: 0, or scored / selected. Of equal positions the first is selected."""
        # Counted on the device, since reading a number would wait for it.  []
        scored = mask.sum().double()
        selected = (self.share * scored).ceil()
        # Sort by falling uncertainty, positions that are not scored last. Of equal ones the first stays first.  [N]
        order = torch.where(mask, uncertainty, -torch.inf).argsort(descending=True, stable=True)
        # Weight the first ones, and leave the others at 0.  [N]
        ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return torch.where(ranks < selected, scored / selected.clamp(min=1), 0.0).to(uncertainty.dtype)


def teacher_entropy(teacher: TeacherTopK) -> Float[Tensor, " N"]:
    """Computes −Σ p log p over the entries and the tail as one event, in nats.

    It is a lower bound of the teacher's entropy, since it leaves out how the tail is spread.
    """
    # log p of the K entries and of the tail. Events of mass 0 add 0.  [N, K + 1]
    log_probs = torch.cat([teacher.log_probs, teacher.tail_log_prob[:, None]], dim=1)
    return -torch.where(log_probs > -torch.inf, log_probs.exp() * log_probs, 0.0).sum(dim=1)
