"""Runs that go on for more steps than they were begun with."""

import json
import math
import shutil
from pathlib import Path

import pytest
from fiddle.experimental import serialization
from safetensors.torch import load_file

from experiments.config.config_items import describe, freeze, record_json, recorded_text, resolve_items
from kd_core.errors import UsageError
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder, read_run_settings
from tests.launchers.command import configs, run, values
from tests.tiny import Tiny

CONSTANT = ["schedule.min_ratio=1.0", "schedule.warmup_steps=0", "checkpoint.every=5", "evaluation.every=5"]


def _train(folder: Path, *items: str) -> str:
    done = run("launchers.train", *configs(list(items)), f"--run_dir={folder}")
    assert done.returncode == 0, done.stderr
    return done.stderr


def _weights(folder: Path) -> bytes:
    return (folder / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def ten(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ten steps at a constant rate."""
    folder = tmp_path_factory.mktemp("ten") / "run"
    _train(folder, *tiny.train_items(10), *CONSTANT)
    return folder


def test_ten_steps_raised_to_twenty_are_twenty_in_one_go(tiny: Tiny, ten: Path, tmp_path: Path) -> None:
    _train(tmp_path / "twenty", *tiny.train_items(20), *CONSTANT)
    raised = tmp_path / "run"
    shutil.copytree(ten, raised)
    first = _weights(raised)
    said = _train(raised, f"run:{raised}", "steps=20")
    assert "setting steps: 10 there, 20 now" in said
    assert "resumed with another length: steps is 10 there, 20 now" in said
    assert "goes on to 20 steps: what varies with the step (the learning rate" in said
    assert _weights(raised) == _weights(tmp_path / "twenty") != first
    assert values(raised) == values(tmp_path / "twenty"), "no step stands twice, none is missing"
    newest = [max((folder / "checkpoints").iterdir()) for folder in (raised, tmp_path / "twenty")]
    moments = [load_file(folder / "tensors_00000.safetensors") for folder in newest]
    assert all(moments[0][name].equal(moments[1][name]) for name in {*moments[0], *moments[1]})

    before = raised / "attempts" / "002" / "before"
    assert (before / "config.json").read_bytes() == (ten / "config.json").read_bytes()
    assert (before / "export" / "model.safetensors").read_bytes() == first
    assert read_run_settings(RunFolder(raised))["steps"] == "20"
    attempt = json.loads((raised / "attempts" / "002" / "attempt.json").read_text())
    assert attempt["changed"] == {"steps": "10 there, 20 now"}
    assert "already complete" in _train(raised, f"run:{raised}")

    # Less than is done is no run to go on with, and changes nothing.
    done = run("launchers.train", *configs([f"run:{raised}", "steps=15"]), f"--run_dir={raised}")
    assert done.returncode == 1
    assert f"steps: got 15; {raised} has done 20. Set more, or use an earlier student" in done.stderr
    assert read_run_settings(RunFolder(raised))["steps"] == "20"
    assert len(list((raised / "attempts").iterdir())) == 3


def test_a_schedule_follows_the_new_length_from_where_the_run_stands(tiny: Tiny, ten: Path, tmp_path: Path) -> None:
    raised = tmp_path / "run"
    shutil.copytree(ten, raised)
    _train(raised, *tiny.train_items(16), *CONSTANT, "schedule.min_ratio=0.0", "schedule.warmup_steps=2")
    rates = {line["step"]: line["train/lr"] for line in read_metrics(raised / "metrics.jsonl") if "train/lr" in line}
    peak = rates[1]
    assert [rates[step] for step in range(1, 11)] == [peak] * 10, "what is done stays as it was"
    # Behind a warm-up of 2, half a cosine over 14 steps, which is 0 on the step after them.
    wanted = [peak * (1 + math.cos(math.pi * (step - 2) / 15)) / 2 for step in range(11, 17)]
    assert [rates[step] for step in range(11, 17)] == pytest.approx(wanted)


def _claim(tiny: Tiny, folder: Path, *changes: str) -> dict[str, str]:
    resolved = resolve_items([*tiny.train_items(10), *CONSTANT, *changes], "Experiment")
    again = folder / "config.json"
    return RunFolder(folder).claim(
        record_json(resolved.config), describe(resolved), recorded_text=lambda: recorded_text(again)
    )


def test_nothing_else_changes_with_the_steps(tiny: Tiny, ten: Path, tmp_path: Path) -> None:
    assert _claim(tiny, ten) == {}
    assert _claim(tiny, ten, "steps=12") == {"steps": "10 there, 12 now"}
    with pytest.raises(UsageError, match=r"another experiment \(optimizer\.lr is"):
        _claim(tiny, ten, "steps=12", "optimizer.lr=1e-5")
    with pytest.raises(UsageError, match=r"another experiment \(schedule\.warmup_steps is"):
        _claim(tiny, ten, "schedule.warmup_steps=3")
    shutil.copytree(ten, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UsageError, match="is finished, and its checkpoints are gone, so it cannot go on to 12 steps"):
        _claim(tiny, tmp_path / "run", "steps=12")


def test_a_record_without_a_setting_that_is_new_is_that_of_the_same_run(tiny: Tiny, ten: Path, tmp_path: Path) -> None:
    """As a run that was begun before `checkpoint.export` existed."""
    lines = (ten / "config.txt").read_text().splitlines(keepends=True)
    (tmp_path / "config.txt").write_text("".join(line for line in lines if not line.startswith("checkpoint.export")))
    old = freeze(resolve_items([*tiny.train_items(10), *CONSTANT], "Experiment").config)
    del old.checkpoint.export
    (tmp_path / "config.json").write_text(serialization.dump_json(old))
    assert "export" not in serialization.dump_json(old.checkpoint)
    assert _claim(tiny, tmp_path) == {}
    with pytest.raises(UsageError, match=r"checkpoint\.export is 'last' there, 'best' now"):
        _claim(tiny, tmp_path, "checkpoint.export=best")
