from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan, sqrt

import pytest

from kd_core.errors import UsageError
from kd_core.training.lr_schedule import (
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
    check_schedule,
)

BUILT_IN = [WarmupCosine(5), WarmupLinear(5), WarmupStableDecay(5, decay_steps=20), WarmupConstant(5)]


def test_a_schedule_by_hand() -> None:
    schedule = WarmupCosine(warmup_steps=2, constant_steps=3, min_ratio=0.1)
    factors = [schedule.factor(step, steps=8) for step in range(1, 9)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2] == pytest.approx(0.1 + 0.9 * 0.8535533905932737)  # (1 + cos π/4) / 2
    assert factors[3] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[4] == pytest.approx(0.1 + 0.9 * 0.1464466094067262)
    assert factors[5:] == pytest.approx([0.1] * 3)


BY_HAND = {
    "linear": (WarmupLinear(2, 2, 0.2), [0.5, 1, 0.2 + 0.8 * 3 / 4, 0.2 + 0.8 * 2 / 4, 0.2 + 0.8 / 4, 0.2, 0.2]),
    "stable": (WarmupStableDecay(2, decay_steps=3, min_ratio=0.2), [0.5, 1, 1, 1, 0.8, 0.6, 0.4]),
    "root": (
        WarmupStableDecay(1, decay_steps=3, shape="sqrt"),
        [1, 1, 1, 1, 1 - sqrt(1 / 4), 1 - sqrt(2 / 4), 1 - sqrt(3 / 4)],
    ),
    "all of it falls": (WarmupStableDecay(0, decay_steps=7), [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    "constant": (WarmupConstant(4), [0.25, 0.5, 0.75, 1, 1, 1, 1]),
}


@pytest.mark.parametrize(("schedule", "wanted"), BY_HAND.values(), ids=BY_HAND)
def test_the_others_by_hand(schedule: Schedule, wanted: list[float]) -> None:
    check_schedule(schedule, 7)
    assert [schedule.factor(step, 7) for step in range(1, 8)] == pytest.approx(wanted)


@pytest.mark.parametrize("schedule", BUILT_IN)
def test_no_step_is_wasted_on_a_rate_of_zero(schedule: Schedule) -> None:
    assert all(schedule.factor(step, 60) > 0 for step in range(1, 61))


REFUSED: list[tuple[Callable[[], Schedule], str]] = [
    (
        lambda: WarmupCosine(8, 3),
        "warmup_steps 8 \\+ constant_steps 3 is more than steps 10.*warmup_steps=3, .*constant_steps=1,",
    ),
    (lambda: WarmupStableDecay(8, decay_steps=3), "warmup_steps 8 \\+ decay_steps 3 is more than steps 10"),
    (lambda: WarmupCosine(20), "schedule: warmup_steps 20 is more .* such as by schedule.warmup_steps=5, or"),
    (lambda: WarmupConstant(11), "warmup_steps 11 is more than steps 10"),
    (lambda: WarmupCosine(1, 0, 2.0), "schedule.min_ratio: got 2.0; wanted 0 to 1"),
    (lambda: WarmupStableDecay(1, decay_steps=-1), "schedule.decay_steps: got -1; wanted at least 0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_a_schedule_that_does_not_fit_is_refused(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_schedule(make(), 10)


@dataclass(frozen=True)
class _Users:
    last: float

    def factor(self, step: int, steps: int) -> float:
        return self.last if step == steps else 1 / (step - (self.last < 0))


@pytest.mark.parametrize(
    ("last", "message"),
    [(nan, r"factor\(7, 7\): got nan"), (inf, r"factor\(7, 7\): got inf"), (-1.0, r"factor\(1, 7\): ZeroDivision")],
)
def test_a_users_schedule_is_looked_at_before_anything_runs(last: float, message: str) -> None:
    check_schedule(_Users(0.0), 7)
    check_schedule(_Users(0.0), 10**9)
    with pytest.raises(UsageError, match=f"schedule: _Users.{message}"):
        check_schedule(_Users(last), 7)
