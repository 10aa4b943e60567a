"""The settings of a run as the training loop reads them. An `Experiment` has them all, and more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kd_core.losses.objective import Objective
from kd_core.parallel.config import Parallel
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, check_settings
from kd_core.training.checkpoints.checkpoint_settings import Checkpoint
from kd_core.training.evaluation import Metric
from kd_core.training.lr_schedule import Schedule
from kd_core.training.optimizer import Optimizer


@dataclass(frozen=True)
class Logger:
    """Settings of what is written to `metrics.jsonl`, TensorBoard and the log.

    Args:
        every: steps between the numbers of a step.
        line_every: steps between lines of the log, where stderr is no terminal and so has no progress line.
        histograms_every: steps between histograms of parameters and gradients (0: none).
    """

    every: int = 1
    line_every: int = 10
    histograms_every: int = 0

    def __post_init__(self) -> None:
        check_settings(self, "logger.", every=AT_LEAST_1, line_every=AT_LEAST_1, histograms_every=AT_LEAST_0)


class ValidationSettings(Protocol):
    """Frequency of evaluations, and the metrics of the user."""

    @property
    def every(self) -> int: ...
    @property
    def metrics(self) -> Sequence[Metric]: ...


class RunSettings(Protocol):
    """Everything that the loop reads of an experiment. Student and data are built before it begins."""

    @property
    def loss(self) -> Objective: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def parallel(self) -> Parallel: ...
    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def logger(self) -> Logger: ...
    @property
    def evaluation(self) -> ValidationSettings: ...
    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def tokens_per_step(self) -> int: ...
    @property
    def rows_per_step(self) -> int: ...
