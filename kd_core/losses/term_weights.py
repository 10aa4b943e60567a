"""Weights of loss terms as pure functions of the step, so that nothing needs saving.

A term's weight is a number, or one of these. `at(step, steps)` is its value at step 1 … `steps`; step 0 (the
validation before training) counts as step 1.
"""

import math
from dataclasses import dataclass

from kd_core.errors import UsageError
from kd_core.ranges import NOT_NEGATIVE, check_ranges


def _progress(step: int, steps: int) -> float:
    """0 at the first step, 1 at the last."""
    return min(1.0, max(0, step - 1) / max(1, steps - 1))


@dataclass(frozen=True)
class Constant:
    """The same weight at every step."""

    value: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, "loss: weight Constant.", value=NOT_NEGATIVE)

    def at(self, step: int, steps: int) -> float:
        """The weight at a step."""
        del step, steps
        return self.value

    def largest(self) -> float:
        """The most that it ever is."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """From `start` at the first step straight to `end` at the last."""

    start: float
    end: float

    def __post_init__(self) -> None:
        check_ranges(self, "loss: weight Linear.", start=NOT_NEGATIVE, end=NOT_NEGATIVE)

    def at(self, step: int, steps: int) -> float:
        """The weight at a step."""
        return self.start + (self.end - self.start) * _progress(step, steps)

    def largest(self) -> float:
        """The most that it ever is."""
        return max(self.start, self.end)


@dataclass(frozen=True)
class Cosine:
    """From `start` at the first step to `end` at the last along half a cosine: slow, fast, slow."""

    start: float
    end: float

    def __post_init__(self) -> None:
        check_ranges(self, "loss: weight Cosine.", start=NOT_NEGATIVE, end=NOT_NEGATIVE)

    def at(self, step: int, steps: int) -> float:
        """The weight at a step."""
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * _progress(step, steps)))

    def largest(self) -> float:
        """The most that it ever is."""
        return max(self.start, self.end)


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear from 0 to `peak` over `warmup_steps`, constant, then linear to `floor` over the last `decay_steps`."""

    peak: float
    warmup_steps: int = 0
    decay_steps: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("peak", "warmup_steps", "decay_steps", "floor"), NOT_NEGATIVE)
        check_ranges(self, "loss: weight WarmupStableDecay.", **ranges)

    def at(self, step: int, steps: int) -> float:
        """The weight at a step; where warm-up and decay overlap, the smaller of the two."""
        step = max(1, step)
        rise = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        fall = min(1.0, (steps - step) / self.decay_steps) if self.decay_steps else 1.0
        return min(self.peak * rise, self.floor + (self.peak - self.floor) * fall)

    def largest(self) -> float:
        """The most that it ever is."""
        return max(self.peak, self.floor)


@dataclass(frozen=True)
class AtStep:
    """A schedule's value at one step; it still knows the schedule, so that a weight of 0 now is no mistake."""

    value: float
    schedule: Constant | Linear | Cosine | WarmupStableDecay

    def largest(self) -> float:
        """The most that the schedule ever is."""
        return self.schedule.largest()


Weight = float | int | Constant | Linear | Cosine | WarmupStableDecay | AtStep


def at_step(weight: Weight, step: int, steps: int) -> float | AtStep:
    """The weight with its schedule resolved; a number stays what it is."""
    if isinstance(weight, AtStep):
        return at_step(weight.schedule, step, steps)
    return AtStep(weight.at(step, steps), weight) if isinstance(weight, SCHEDULES) else weight


def largest(weight: Weight) -> float:
    """The most that a weight ever is."""
    return weight.largest() if isinstance(weight, (AtStep, *SCHEDULES)) else weight


def value_of(weight: Weight) -> float:
    """The number of a weight whose schedule was resolved.

    Raises:
        UsageError: it was not.
    """
    if isinstance(weight, SCHEDULES):
        raise UsageError(f"loss: the weight {weight} depends on the step. Call objective.at(step, steps) first.")
    return weight.value if isinstance(weight, AtStep) else weight


SCHEDULES = (Constant, Linear, Cosine, WarmupStableDecay)
