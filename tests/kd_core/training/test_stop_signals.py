import os
import signal
import time

import pytest

from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.training.stop_signals import StopSignals, _age_by_ps, command_age, parse_seconds
from tests.patience import patience
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("0.5", 0.5), ("02:30", 150), ("01:00:01", 3601), ("02:03:04:05", 2 * 86400 + 3 * 3600 + 245)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4:5", "-1", "00:00", "1h", "inf", "nan"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="DD:HH:MM:SS"):
        parse_seconds(text)


def test_the_age_is_that_of_the_process() -> None:
    before = command_age({})
    time.sleep(0.2)
    own = command_age({})
    assert 0.1 < own - before < patience(60)
    assert command_age({"TORCHELASTIC_RUN_ID": "x"}) > own - 0.02, "the parent did not begin later"


def test_its_age_by_ps_is_the_same() -> None:
    before = command_age({})
    by_ps = _age_by_ps(os.getpid())
    assert before - 1.5 < by_ps < command_age({}) + 1.5  # ps counts whole seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_heard_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stopping:
        assert stopping.agree_on_stop(World()) is None
        os.kill(os.getpid(), number)
        assert stopping.agree_on_stop(World()) == f"told to by {number.name}"
    assert signal.getsignal(number) == before


def test_a_second_interrupt_is_not_waited_for() -> None:
    with StopSignals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_time_is_over_from_the_start_of_the_process_on() -> None:
    assert StopSignals(max_seconds=1e-3).agree_on_stop(World()) == "its time is over"
    assert StopSignals(max_seconds=command_age() + 3600).agree_on_stop(World()) is None


def _one_of_two_is_told(world: World) -> None:
    with StopSignals() as stopping:
        assert stopping.agree_on_stop(world) is None
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.agree_on_stop(world) == "told to by SIGTERM"


def test_all_ranks_stop_when_one_is_told_to() -> None:
    run_ranks(2, _one_of_two_is_told)
