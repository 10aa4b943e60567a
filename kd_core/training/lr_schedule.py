"""Learning-rate schedules as pure functions of the step, so that nothing needs saving.

WarmupCosine         rises, falls along half a cosine, stays at its floor
WarmupLinear         rises, falls straight, stays at its floor
WarmupStableDecay    rises, stays at its peak, falls over its last steps
WarmupConstant       rises, stays at its peak
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol, runtime_checkable

from kd_core.errors import UsageError
from kd_core.ranges import AT_LEAST_0, SHARE, check_ranges

CHECKED_STEPS = 1000


@runtime_checkable
class Schedule(Protocol):
    """A learning rate as factors on its peak; any frozen dataclass with this method."""

    def factor(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate for step 1 … `steps`."""
        ...


@dataclass(frozen=True)
class _Warmup(ABC):
    """A linear warm-up, and then what a subclass says."""

    warmup_steps: int = 5

    def __post_init__(self) -> None:
        check_ranges(self, "schedule.", **dict.fromkeys(self._lengths(), AT_LEAST_0))

    def _lengths(self) -> dict[str, int]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name.endswith("_steps")}

    def check(self, steps: int) -> None:
        """Refuse a schedule that does not fit into `steps`.

        Raises:
            UsageError: its parts are longer than the run.
        """
        lengths = self._lengths()
        if sum(lengths.values()) > steps:
            shown = " + ".join(f"{name} {length}" for name, length in lengths.items())
            raise UsageError(f"schedule: {shown} is more than steps {steps}. Shorten them or train longer.")

    @abstractmethod
    def after(self, step: int, steps: int) -> float:
        """The factor at a step behind the warm-up."""
        ...

    def factor(self, step: int, steps: int) -> float:
        """See `Schedule`."""
        return step / self.warmup_steps if step <= self.warmup_steps else self.after(step, steps)


@dataclass(frozen=True)
class _Falling(_Warmup):
    """After the warm-up, a fall to `min_ratio` of the peak, which then stays for the last `constant_steps`.

    The floor is reached on the step after the fall, so no step is wasted on a rate of 0.
    """

    constant_steps: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "schedule.", min_ratio=SHARE)

    @abstractmethod
    def height(self, progress: float) -> float:
        """From 1 at a progress of 0 to 0 at 1."""
        ...

    def after(self, step: int, steps: int) -> float:
        """See `_Warmup`."""
        decay = steps - self.constant_steps - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / (decay + 1))
        return self.min_ratio + (1 - self.min_ratio) * self.height(progress)


@dataclass(frozen=True)
class WarmupCosine(_Falling):
    """Linear warm-up, cosine decay to `min_ratio` of the peak, then constant for the last `constant_steps`."""

    def height(self, progress: float) -> float:
        """Half a cosine."""
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupLinear(_Falling):
    """Linear warm-up, linear decay to `min_ratio` of the peak, then constant for the last `constant_steps`."""

    def height(self, progress: float) -> float:
        """A straight line."""
        return 1 - progress


@dataclass(frozen=True)
class WarmupStableDecay(_Warmup):
    """Linear warm-up, constant, then decay to `min_ratio` of the peak over the last `decay_steps`.

    It is known as WSD (arXiv 2404.06395). `shape` is linear, or sqrt: 1 − √progress (arXiv 2405.18392).
    """

    decay_steps: int = field(kw_only=True)
    min_ratio: float = 0.0
    shape: Literal["linear", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "schedule.", min_ratio=SHARE)

    def after(self, step: int, steps: int) -> float:
        """See `_Warmup`."""
        progress = max(0, step - steps + self.decay_steps) / (self.decay_steps + 1)
        fallen = math.sqrt(progress) if self.shape == "sqrt" else progress
        return 1 - (1 - self.min_ratio) * fallen


@dataclass(frozen=True)
class WarmupConstant(_Warmup):
    """Linear warm-up, then the peak."""

    def after(self, step: int, steps: int) -> float:
        """See `_Warmup`."""
        del step, steps
        return 1.0


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """A schedule's factor at a step.

    Raises:
        UsageError: it fails, or gives no number of at least 0.
    """
    where = f"schedule: {type(schedule).__name__}.factor({step}, {steps})"
    try:
        factor = float(schedule.factor(step, steps))
    except Exception as error:
        raise UsageError(f"{where}: {type(error).__name__}: {error}") from error
    if not 0 <= factor < math.inf:
        raise UsageError(f"{where}: got {factor}; wanted a number of at least 0.")
    return factor


def check_schedule(schedule: Schedule, steps: int) -> None:
    """Refuse a schedule that does not fit into `steps`, by its factors at each of them, or at some of many.

    Raises:
        UsageError: as in `rate_factor`, or its parts are longer than the run.
    """
    if isinstance(schedule, _Warmup):
        schedule.check(steps)
    for step in {*range(1, steps, 1 + steps // CHECKED_STEPS), steps}:
        rate_factor(schedule, step, steps)
