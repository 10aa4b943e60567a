"""Optimisers as plain settings that make a torch optimiser once the student exists."""

from dataclasses import dataclass

import torch
from torch import nn

from kd_core.errors import UsageError
from kd_core.ranges import ABOVE_0, NOT_NEGATIVE, SHARE_BELOW_1, check_ranges

ON_NON_FINITE = ("stop", "skip")


@dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv 1711.05101). Weight decay on matrices only; the gradient is clipped to `clip_norm` (0: never).

    A step whose loss or gradient is not finite never moves the student. The run then stops, or skips the step
    (`on_non_finite`) and goes on with the next rows, up to `max_skipped` times.
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    on_non_finite: str = "stop"
    max_skipped: int = 8

    def __post_init__(self) -> None:
        if self.on_non_finite not in ON_NON_FINITE:
            raise UsageError(
                f"optimizer.on_non_finite: got {self.on_non_finite!r}; wanted one of {', '.join(ON_NON_FINITE)}."
            )
        check_ranges(
            self, "optimizer.", lr=ABOVE_0, eps=ABOVE_0, betas=SHARE_BELOW_1,
            **dict.fromkeys(("weight_decay", "clip_norm", "max_skipped"), NOT_NEGATIVE),
        )  # fmt: skip

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of `model`'s trainable parameters."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
