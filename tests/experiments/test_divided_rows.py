"""A run whose rows are divided by position: begun on two ranks, gone on with in one process, and ended on two."""

import signal
from pathlib import Path

import fiddle as fdl
import pytest

from experiments.base.experiment import Experiment
from experiments.config import config_items
from kd_core.errors import UsageError
from kd_core.parallel.config import LAYOUT_SETTINGS
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.student import Student
from kd_core.students.transformers_student.transformers_student import TransformersStudent
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from tests.ranks import run_ranks
from tests.tiny import Tiny


class StopAfter(StopSignals):
    """A stop signal behind so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def agree_on_stop(self, world: World, has_data: bool = True) -> str | None:
        self.left -= 1
        self.received = signal.SIGTERM if self.left == 0 else self.received
        return super().agree_on_stop(world, has_data)


def _train(world: World, folder: Path, items: list[str], steps: int) -> None:
    resolved = config_items.resolve_items(items, "Experiment")
    run_folder, may_change = RunFolder(folder), frozenset(f"parallel.{name}" for name in LAYOUT_SETTINGS)
    if world.is_first:
        folder.mkdir(exist_ok=True)
        run_folder.claim(config_items.record_json(resolved.config), config_items.describe(resolved), may_change)
    world.barrier()
    experiment = fdl.build(resolved.config)
    assert isinstance(experiment, Experiment)
    experiment.check(world.size)
    assert experiment.run(run_folder, world, StopAfter(steps)) == (steps == experiment.steps)


def test_a_student_that_attends_to_whole_rows_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_items.resolve_items([*tiny.train_items(), "parallel.context_parallel=2"], "Experiment").config
    experiment = fdl.build(config)
    assert "rows divided over 2" in experiment.check(4)["layout"]
    monkeypatch.setattr(Decoder, "shares_rows", Student.shares_rows)  # that of a family which does not set it
    with pytest.raises(UsageError, match=r"context_parallel: got 2; Decoder attends to whole rows\. Leave it at 1"):
        experiment.check(4)


def test_a_budget_needs_blocks_that_can_be_measured(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_items.resolve_items([*tiny.train_items(), "parallel.recompute=budget:0.5"], "Experiment").config
    experiment = fdl.build(config)
    experiment.check()
    monkeypatch.setattr(Decoder, "measures_blocks", TransformersStudent.measures_blocks)
    with pytest.raises(UsageError, match=r"parallel\.recompute: got budget:0\.5; .* Take full or every:N"):
        experiment.check()


def test_a_run_goes_on_with_and_without_divided_rows(tiny: Tiny, tmp_path: Path) -> None:
    items, divided = tiny.train_items(6), "parallel.context_parallel=2"
    _train(World(), tmp_path / "undisturbed", items, 6)
    run_ranks(2, _train, tmp_path / "divided", [*items, divided], 2)
    _train(World(), tmp_path / "divided", items, 2)
    run_ranks(2, _train, tmp_path / "divided", [*items, divided], 6)
    wanted, found = (list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("undisturbed", "divided"))
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if not name.startswith("speed/"):
                # The calibration error counts positions in bins, whose bounds rounding may cross.
                assert one[name] == pytest.approx(value, rel=1e-5, abs=1e-3 if name == "val/ece" else 1e-7), name
