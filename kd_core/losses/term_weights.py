"""Weights of loss terms as pure functions of the step, so that a checkpoint holds nothing of them.

A term's weight is a number or one of these schedules. `at(step, steps)` returns its value at steps 1 to `steps`.
Step 0, the validation before training, counts as step 1.
"""

import math
from dataclasses import dataclass

from kd_core.errors import UsageError
from kd_core.ranges import NOT_NEGATIVE, check_settings


def _progress(step: int, steps: int) -> float:
    """Returns the progress of training, from 0 at the first step to 1 at the last."""
    return min(1.0, max(0, step - 1) / max(1, steps - 1))


@dataclass(frozen=True)
class Constant:
    """The same weight at every step."""

    value: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, "loss: weight Constant.", value=NOT_NEGATIVE)

    def at(self, step: int, steps: int) -> float:
        del step, steps
        return self.value

    def max_value(self) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` at the first step to `end` at the last."""

    start: float
    end: float

    def __post_init__(self) -> None:
        check_settings(self, "loss: weight Linear.", start=NOT_NEGATIVE, end=NOT_NEGATIVE)

    def at(self, step: int, steps: int) -> float:
        return self.start + (self.end - self.start) * _progress(step, steps)

    def max_value(self) -> float:
        return max(self.start, self.end)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` at the first step to `end` at the last: slow, fast, slow."""

    start: float
    end: float

    def __post_init__(self) -> None:
        check_settings(self, "loss: weight Cosine.", start=NOT_NEGATIVE, end=NOT_NEGATIVE)

    def at(self, step: int, steps: int) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * _progress(step, steps)))

    def max_value(self) -> float:
        return max(self.start, self.end)


@dataclass(frozen=True)
class WarmupStableDecay:
    """A line from 0 to `peak` over `warmup_steps`, a constant, and a line to `floor` over the last `decay_steps`."""

    peak: float
    warmup_steps: int = 0
    decay_steps: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("peak", "warmup_steps", "decay_steps", "floor"), NOT_NEGATIVE)
        check_settings(self, "loss: weight WarmupStableDecay.", **ranges)

    def at(self, step: int, steps: int) -> float:
        """Returns the weight at a step. Where warm-up and decay overlap, it is the smaller of the two."""
        step = max(1, step)
        # Warm-up reaches 1 at step `warmup_steps`. Decay starts `decay_steps` before the end and reaches 0 there.
        warmup_factor = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        decay_factor = min(1.0, (steps - step) / self.decay_steps) if self.decay_steps else 1.0
        return min(self.peak * warmup_factor, self.floor + (self.peak - self.floor) * decay_factor)

    def max_value(self) -> float:
        return max(self.peak, self.floor)


@dataclass(frozen=True)
class ResolvedWeight:
    """The value of a schedule at one step.

    It keeps its schedule, because an objective is valid if its weights are 0 at this step and positive at others.
    """

    value: float
    schedule: Constant | Linear | Cosine | WarmupStableDecay

    def max_value(self) -> float:
        return self.schedule.max_value()


Weight = float | int | Constant | Linear | Cosine | WarmupStableDecay | ResolvedWeight


def resolve_weight(weight: Weight, step: int, steps: int) -> float | ResolvedWeight:
    """Replaces a schedule by its value at a step. Plain numbers are returned unchanged."""
    if isinstance(weight, ResolvedWeight):
        return resolve_weight(weight.schedule, step, steps)
    return ResolvedWeight(weight.at(step, steps), weight) if isinstance(weight, SCHEDULES) else weight


def max_weight(weight: Weight) -> float:
    """Returns the largest value that a weight takes at any step."""
    return weight.max_value() if isinstance(weight, (ResolvedWeight, *SCHEDULES)) else weight


def resolved_value(weight: Weight) -> float:
    """Returns the number of a weight whose schedule was resolved.

    Raises:
        UsageError: the weight is still a schedule.
    """
    if isinstance(weight, SCHEDULES):
        raise UsageError(f"loss: the weight {weight} depends on the step. Call objective.at(step, steps) first.")
    return weight.value if isinstance(weight, ResolvedWeight) else weight


SCHEDULES = (Constant, Linear, Cosine, WarmupStableDecay)
