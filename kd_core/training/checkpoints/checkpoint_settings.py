"""Settings of checkpoints, as an experiment has them."""

from dataclasses import dataclass
from typing import Literal

from kd_core.errors import UsageError
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, check_settings


@dataclass(frozen=True)
class Checkpoint:
    """Settings of when and how to save, and of which checkpoints to keep.

    Args:
        every: the steps between checkpoints. The last step and an early stop are saved too.
        asynchronous: training waits for a copy in memory alone, which a thread writes. The bytes are the same.
        keep_newest: how many of the newest to keep. The second newest replaces the newest if that is damaged.
        keep_best: how many of the best to keep besides, among those whose step was validated.
        best_metric: the metric that ranks them.
        best_mode: the direction of the metric: its smallest values are the best (min), or its largest (max).
        export: the source of `export/` at the end: the last step, or the best checkpoint.
    """

    every: int = 10
    asynchronous: bool = True
    keep_newest: int = 2
    keep_best: int = 1
    best_metric: str = "val/loss"
    best_mode: Literal["min", "max"] = "min"
    export: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        check_settings(self, "checkpoint.", every=AT_LEAST_1, keep_newest=AT_LEAST_1, keep_best=AT_LEAST_0)
        if self.export == "best" and not self.keep_best:
            raise UsageError(
                "checkpoint.export: got best, and checkpoint.keep_best=0 keeps none. Set checkpoint.keep_best=1, or "
                "checkpoint.export=last."
            )
