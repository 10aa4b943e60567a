import pytest

from kd_core.errors import UsageError
from kd_core.training.schedule import WarmupCosine


def test_a_schedule_by_hand() -> None:
    schedule = WarmupCosine(warmup_steps=2, constant_steps=3, min_ratio=0.1)
    factors = [schedule.factor(step, steps=8) for step in range(1, 9)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2] == pytest.approx(0.1 + 0.9 * 0.8535533905932737)  # (1 + cos π/4) / 2
    assert factors[3] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[4] == pytest.approx(0.1 + 0.9 * 0.1464466094067262)
    assert factors[5:] == pytest.approx([0.1] * 3)


def test_no_step_is_wasted_on_a_rate_of_zero() -> None:
    assert all(WarmupCosine(5).factor(step, 60) > 0 for step in range(1, 61))


@pytest.mark.parametrize(
    ("schedule", "message"), [(WarmupCosine(8, 3), "more than steps 10"), (WarmupCosine(1, 0, 2.0), "0 to 1")]
)
def test_a_schedule_that_does_not_fit_is_refused(schedule: WarmupCosine, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        schedule.check(10)
