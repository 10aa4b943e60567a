"""Intervals against published quantiles, tables as text, and the moving table."""

import csv
import io

import pytest

from launchers.reports import text_tables
from launchers.sweeps.live_table import LiveTable
from launchers.sweeps.point_process import Slot, slots
from launchers.sweeps.seed_statistics import mean_of, t_quantile
from launchers.sweeps.slurm import launcher

# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: upper 0.025 critical values of Student's t.
PUBLISHED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 100: 1.984}


@pytest.mark.parametrize(("freedom", "wanted"), PUBLISHED.items())
def test_quantiles_of_t(freedom: int, wanted: float) -> None:
    assert t_quantile(freedom) == pytest.approx(wanted, abs=5.1e-4)


def test_a_mean_has_an_interval_from_two_values_on() -> None:
    assert mean_of([2.5]).half is None
    found = mean_of([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(4.303 / 3**0.5, rel=1e-4)
    assert mean_of([4.0] * 5).half == 0


def test_columns_stand_under_each_other_numbers_to_the_right() -> None:
    assert text_tables.format_aligned(["a", "n"], [["xy", "5"], ["z", "1,000"]]).splitlines() == [
        "a       n",
        "xy      5",
        "z   1,000",
    ]


def test_bars_and_commas_in_values_do_not_break_a_table() -> None:
    assert text_tables.format_markdown(["a"], [["x|y"]]).splitlines() == ["| a |", "|---|", "| x\\|y |"]
    text = text_tables.format_csv(["a"], [['(1, "2")\n']])
    assert list(csv.reader(io.StringIO(text))) == [["a"], ['(1, "2")\n']]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_moves_on_a_terminal_and_stays_away_elsewhere() -> None:
    screen, log = _Terminal(), io.StringIO()
    for stream in (screen, log):
        live = LiveTable(["id"], lambda: [["x"], ["y"]], stream)
        live.draw()
        live.say("finished")
    assert screen.getvalue() == "id\nx\ny\n\x1b[3F\x1b[Jfinished\nid\nx\ny\n"
    assert log.getvalue() == "finished\n"


def test_a_machine_is_shared_between_jobs() -> None:
    gpus = ["0", "1", "2", "3"]
    assert slots(2, 2, gpus, range(8)) == [Slot(("0", "1"), (0, 1, 2, 3)), Slot(("2", "3"), (4, 5, 6, 7))]
    assert slots(3, 1, ["7"], [4, 5]) == [Slot(("7",), (4,)), Slot(("7",), (5,)), Slot(("7",), (4,))]
    assert slots(1, 1, [], [0, 1]) == [Slot((), (0, 1))]


def test_nodes_meet_at_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher(["a"], 0, 1, "123") == []
    assert launcher(["a"], 0, 8, "123") == ["--standalone", "--nproc-per-node", "8"]
    common = ["--nnodes", "2", "--nproc-per-node", "8", "--node-rank", "1", "--rdzv-id", "123"]
    named = launcher(["localhost", "b"], 1, 8, "123")
    assert named == [*common, "--master-addr", "localhost", "--master-port", "29623"]
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.7")
    aliased = launcher(["no-host.invalid", "b"], 1, 8, "123")
    assert aliased == [*common, "--master-addr", "10.0.0.7", "--master-port", "29623"]
