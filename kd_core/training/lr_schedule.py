"""Learning-rate schedules as pure functions of the step, so that a checkpoint need not hold their state.

WarmupCosine         linear warm-up, decay along half a cosine, constant at the floor
WarmupLinear         linear warm-up, linear decay, constant at the floor
WarmupStableDecay    linear warm-up, constant at the peak, decay over the last steps
WarmupConstant       linear warm-up, constant at the peak
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol, runtime_checkable

from kd_core.errors import UsageError
from kd_core.ranges import AT_LEAST_0, SHARE, check_settings

CHECKED_STEPS = 1000


@runtime_checkable
class Schedule(Protocol):
    """A learning rate as factors on its peak. Any frozen dataclass with this method is one."""

    def factor(self, step: int, steps: int) -> float:
        """Returns the factor on the peak learning rate at `step`, from 1 to `steps`."""
        ...


@dataclass(frozen=True)
class _Warmup(ABC):
    """A linear warm-up, followed by the factors of a subclass."""

    warmup_steps: int = 5

    def __post_init__(self) -> None:
        check_settings(self, "schedule.", **dict.fromkeys(self._lengths(), AT_LEAST_0))

    def _lengths(self) -> dict[str, int]:
        return {
            setting.name: getattr(self, setting.name) for setting in fields(self) if setting.name.endswith("_steps")
        }

    def check(self, steps: int) -> None:
        """Checks that the phases of the schedule fit into `steps`.

        Raises:
            UsageError: the phases together are longer than the run.
        """
        lengths = {name: length for name, length in self._lengths().items() if length}
        if (total := sum(lengths.values())) > steps:
            shown = " + ".join(f"{name} {length}" for name, length in lengths.items())
            # Phases of the same proportions, over half of the run.
            fitting = ", ".join(f"schedule.{name}={length * steps // (2 * total)}" for name, length in lengths.items())
            raise UsageError(
                f"schedule: {shown} is more than steps {steps}. Shorten them, such as by {fitting}, or train longer."
            )

    @abstractmethod
    def after_warmup(self, step: int, steps: int) -> float:
        """Returns the factor at a step after the warm-up."""
        ...

    def factor(self, step: int, steps: int) -> float:
        return step / self.warmup_steps if step <= self.warmup_steps else self.after_warmup(step, steps)


@dataclass(frozen=True)
class _WarmupDecay(_Warmup):
    """A linear warm-up, a decay to `min_ratio` of the peak, and `constant_steps` at that floor.

    The floor is reached on the step after the decay, so that no step is wasted on a rate of 0.
    """

    constant_steps: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, "schedule.", min_ratio=SHARE)

    @abstractmethod
    def decay(self, progress: float) -> float:
        """Returns the share of the decay that is left: 1 at a progress of 0, and 0 at 1."""
        ...

    def after_warmup(self, step: int, steps: int) -> float:
        decay_steps = steps - self.constant_steps - self.warmup_steps
        # The + 1 puts progress 1, and so the floor, on the first step after the decay.
        progress = min(1.0, (step - self.warmup_steps) / (decay_steps + 1))
        return self.min_ratio + (1 - self.min_ratio) * self.decay(progress)


@dataclass(frozen=True)
class WarmupCosine(_WarmupDecay):
    """Linear warm-up, cosine decay to `min_ratio` of the peak, then constant for the last `constant_steps`."""

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupLinear(_WarmupDecay):
    """Linear warm-up, linear decay to `min_ratio` of the peak, then constant for the last `constant_steps`."""

    def decay(self, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True)
class WarmupStableDecay(_Warmup):
    """Linear warm-up, constant, then decay to `min_ratio` of the peak over the last `decay_steps`.

    Known as WSD (arXiv 2404.06395). `shape` is that of the decay: linear, or sqrt for 1 − √progress (arXiv 2405.18392).
    """

    decay_steps: int = field(kw_only=True)
    min_ratio: float = 0.0
    shape: Literal["linear", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, "schedule.", min_ratio=SHARE)

    def after_warmup(self, step: int, steps: int) -> float:
        progress = max(0, step - steps + self.decay_steps) / (self.decay_steps + 1)
        decayed = math.sqrt(progress) if self.shape == "sqrt" else progress
        return 1 - (1 - self.min_ratio) * decayed


@dataclass(frozen=True)
class WarmupConstant(_Warmup):
    """Linear warm-up, then constant at the peak."""

    def after_warmup(self, step: int, steps: int) -> float:
        del step, steps
        return 1.0


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Returns a schedule's factor at a step.

    Raises:
        UsageError: the schedule fails, or does not return a number of at least 0.
    """
    error_prefix = f"schedule: {type(schedule).__name__}.factor({step}, {steps})"
    try:
        factor = float(schedule.factor(step, steps))
    except Exception as error:
        raise UsageError(f"{error_prefix}: {type(error).__name__}: {error}") from error
    if not 0 <= factor < math.inf:
        raise UsageError(f"{error_prefix}: got {factor}; wanted a number of at least 0.")
    return factor


def check_schedule(schedule: Schedule, steps: int) -> None:
    """Checks that a schedule fits into `steps`, and that its factors are numbers of at least 0.

    The factors of about `CHECKED_STEPS` steps are tried, evenly spaced, and that of the last step.

    Raises:
        UsageError: as in `rate_factor`, or the phases together are longer than the run.
    """
    if isinstance(schedule, _Warmup):
        schedule.check(steps)
    for step in {*range(1, steps, 1 + steps // CHECKED_STEPS), steps}:
        rate_factor(schedule, step, steps)
