"""Steps whose loss is not finite: nothing moves, the records are named, and the run stops or goes on as it was told."""

import json
from dataclasses import replace
from pathlib import Path

import fiddle as fdl
import pytest
import torch

from experiments.base.experiment import Experiment
from experiments.config import config_items
from kd_core.errors import NonFiniteError
from kd_core.losses.objective import Distillation, Objective
from kd_core.losses.term_weights import WarmupStableDecay
from kd_core.parallel.world import World
from kd_core.students.starts.start import build_student
from kd_core.training import step
from kd_core.training.checkpoints import checkpoint
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.optimizer import AdamW
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from tests.tiny import Tiny

STEPS = 5


def _experiment(tiny: Tiny, optimizer: AdamW) -> Experiment:
    """A weight beyond float32 at every step but the last, where it is 1."""
    items = [*tiny.train_items(STEPS), "evaluation.every=100", "checkpoint.keep_newest=9"]
    built = fdl.build(config_items.resolve_items(items, "Experiment").config)
    loss = Objective({"kd": Distillation(weight=WarmupStableDecay(peak=1e40, decay_steps=1, floor=1.0))})
    return replace(built, loss=loss, optimizer=optimizer)


@pytest.fixture(params=["host", "device"], autouse=True)
def decided_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, the kernel leaves out the step, and the host learns of it behind the next one."""
    if request.param == "device":
        monkeypatch.setattr(step, "decides_on_device", lambda *_: True)


def _run(experiment: Experiment, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    experiment.run(RunFolder(folder), World(), StopSignals())


def test_skipped_steps_move_nothing_and_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    experiment = _experiment(tiny, AdamW(on_non_finite="skip", max_skipped=4))
    _run(experiment, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [line["train/skipped_steps"] for line in lines] == [1, 2, 3, 4, 4]
    assert ["train/loss" in line for line in lines] == [False] * 4 + [True]
    start = build_student(experiment.student, torch.device("cpu"), 0)
    still, moved = (build_student(experiment.student, torch.device("cpu"), 0) for _ in range(2))
    for model, number in ((still, 4), (moved, 5)):
        checkpoint.load_model(tmp_path / "run" / "checkpoints" / f"step_{number:08d}", model)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), still.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(start.parameters(), moved.parameters(), strict=True))
    seen = [json.loads((tmp_path / "run" / f"failed_step_{n}_rank_0.json").read_text())["records"] for n in range(1, 5)]
    assert all(seen)
    assert len({tuple(names) for names in seen}) > 1, "the rows move on"


def test_more_than_are_allowed_stop_the_run_also_when_it_was_resumed(tiny: Tiny, tmp_path: Path) -> None:
    experiment = _experiment(tiny, AdamW(on_non_finite="skip", max_skipped=2))
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"step 3: .* Steps skipped: 3\."):
            _run(experiment, tmp_path / "run")
        assert checkpoint.read_progress(tmp_path / "run" / "checkpoints" / "step_00000002").skipped == 2


def test_by_default_the_first_one_stops_the_run(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 1: .*optimizer\.on_non_finite=skip"):
        _run(_experiment(tiny, AdamW()), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
