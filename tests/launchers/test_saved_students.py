"""Students out of runs and checkpoints into Hugging Face folders, read again by transformers."""

import json
import logging
import shutil
from math import nan
from pathlib import Path

import fiddle as fdl
import pytest
import torch
import transformers

from experiments.config.config_items import describe, record_json, resolve_items
from experiments.config.saved_students import find_student, load_student
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.training import loop
from kd_core.training.checkpoints.checkpoint import list_checkpoints, read_progress
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from tests.launchers.command import configs, run
from tests.tiny import Tiny

CPU = torch.device("cpu")
STEPS = 8
_LEAST_SURE = ["checkpoint.best_metric=val/student_entropy", "checkpoint.best_mode=max"]  # soon after the start


def train(folder: Path, items: list[str]) -> RunFolder:
    """As the command does, in this process."""
    resolved = resolve_items(items, "Experiment")
    experiment = fdl.build(resolved.config)
    experiment.check()
    folder.mkdir(exist_ok=True)
    RunFolder(folder).claim(record_json(resolved.config), describe(resolved))
    RunFolder(folder).begin_attempt({})
    assert experiment.run(RunFolder(folder), World(), StopSignals())
    return RunFolder(folder)


def _items(tiny: Tiny) -> list[str]:
    """A run whose best is in its middle: it is thrown off at its end."""
    often = ["checkpoint.every=2", "evaluation.every=2", "checkpoint.keep_newest=4", "optimizer.lr=3e-3"]
    return [*tiny.train_items(STEPS), *often, "schedule.warmup_steps=6", "loss.terms.kd.weight=1.0"]


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tmp_path_factory.mktemp("saved") / "run", [*_items(tiny), "checkpoint.best_mode=min"])


def _logits(folder: Path) -> torch.Tensor:
    """transformers' own, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(2, 26)[None]).logits


def _our_logits(folder: Path) -> torch.Tensor:
    model, _ = load_student(folder, CPU)
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        return model(ids, torch.arange(24)[None], torch.zeros_like(ids))


def _export(student: Path, out: Path, *flags: str) -> str:
    done = run("launchers.export_student", f"--student={student}", f"--out={out}", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_any_step_of_a_run_that_was_stopped_and_a_checkpoint_are_exported(whole: RunFolder, tmp_path: Path) -> None:
    stopped = tmp_path / "run"
    shutil.copytree(whole.path, stopped)
    shutil.rmtree(stopped / "export")
    lines = {line["step"]: line["val/loss"] for line in read_metrics(stopped / "metrics.jsonl") if "val/loss" in line}
    steps = [read_progress(folder).step for folder in list_checkpoints(RunFolder(stopped).checkpoints)]
    best = min(steps, key=lambda step: lines[step])
    for number, (flags, step) in enumerate(
        ((["--step=last"], STEPS), (["--step=best"], best), (["--step=4"], 4), ([], STEPS))
    ):
        assert f"step_{step:08d}, 0.0M parameters in float32" in _export(stopped, tmp_path / str(number), *flags)
        wanted = _our_logits(stopped / "checkpoints" / f"step_{step:08d}")
        assert (_logits(tmp_path / str(number)) - wanted).abs().max() < 1e-5
    folder = stopped / "checkpoints" / "step_00000004"
    _export(folder, tmp_path / "bf16", "--dtype=bfloat16")
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert weights.dtype == torch.bfloat16
    rounded, _ = load_student(folder, CPU)
    ours = {name: parameter.detach().bfloat16() for name, parameter in rounded.named_parameters()}
    for name, parameter in weights.model.named_parameters():
        assert torch.equal(parameter, ours[name]), name


def test_an_export_of_the_best_is_that_of_the_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    found = train(tmp_path / "run", [*_items(tiny), *_LEAST_SURE, "checkpoint.export=best"])
    values = {int(line["step"]): line["val/student_entropy"] for line in read_metrics(found.path / "metrics.jsonl")
              if "val/student_entropy" in line and line["step"]}  # fmt: skip
    best = max(values, key=lambda step: values[step])
    assert best != STEPS, "else the test shows nothing"
    wanted = _our_logits(found.checkpoints / f"step_{best:08d}")
    assert (_logits(found.export) - wanted).abs().max() < 1e-5
    assert (_logits(found.export) - _our_logits(found.checkpoints / f"step_{STEPS:08d}")).abs().max() > 1e-3
    assert json.loads((found.path / "config.json").read_text())


def test_where_no_step_was_measured_as_finite_the_last_is_exported_with_a_warning(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured = loop.evaluate_all
    monkeypatch.setattr(loop, "evaluate_all", lambda *given, **named: {**measured(*given, **named), "val/loss": nan})
    items = [*_items(tiny), "checkpoint.export=best"]
    with caplog.at_level(logging.WARNING, "kd"):
        found = train(tmp_path / "run", items)
    assert "export: of the last step, because no checkpoint has a finite val/loss" in caplog.text
    assert (_logits(found.export) - _our_logits(found.checkpoints / f"step_{STEPS:08d}")).abs().max() < 1e-5
    times = {path: path.stat().st_mtime_ns for path in found.path.rglob("*")}
    assert fdl.build(resolve_items(items, "Experiment").config).run(found, World(), StopSignals())
    assert times == {path: path.stat().st_mtime_ns for path in found.path.rglob("*")}


def test_a_best_export_is_refused_where_no_best_is_kept(tiny: Tiny) -> None:
    config = resolve_items(
        [*tiny.train_items(), "checkpoint.export=best", "checkpoint.keep_best=0"], "Experiment"
    ).config
    with pytest.raises(UsageError, match=r"checkpoint\.export: got best, and checkpoint\.keep_best=0 keeps none"):
        fdl.build(config)
    with pytest.raises(UsageError, match=r"checkpoint\.export"):
        resolve_items([*tiny.train_items(), "checkpoint.export=first"], "Experiment")


def test_what_is_not_there_is_one_message(whole: RunFolder, tmp_path: Path) -> None:
    for student, step, message in (
        (
            whole.path,
            "3",
            "--step=3: .* has no such checkpoint. It has checkpoints of the steps 2, 4, 6, 8: name one of them, or "
            "leave --step out for its export/.",
        ),
        (whole.path, "newest", "--step=newest: wanted best, last or a number"),
        (whole.export, "best", "is no run, so it has no steps"),
    ):
        with pytest.raises(UsageError, match=message):
            find_student(student, step)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    done = run("launchers.export_student", f"--student={whole.path}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "holds something (thesis.txt). Name a new folder" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_run_without_checkpoints_or_attempts_gives_its_export(whole: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(whole.path, tmp_path / "run")
    for name in ("checkpoints", "attempts"):
        shutil.rmtree(tmp_path / "run" / name)
    assert "run/export" in _export(tmp_path / "run", tmp_path / "out")
    assert torch.equal(_logits(tmp_path / "out"), _logits(whole.export))


@pytest.mark.parametrize("layout", ["parallel.tensor_parallel=2", "parallel.shard=full"])
def test_the_checkpoints_of_two_ranks_are_exported_by_one_process(tiny: Tiny, tmp_path: Path, layout: str) -> None:
    flags = configs([*_items(tiny), *_LEAST_SURE, "checkpoint.export=best", layout])
    done = run("launchers.train", *flags, f"--run_dir={tmp_path / 'run'}", nproc=2)
    assert done.returncode == 0, done.stderr
    assert "export: of step_00000002, the best val/student_entropy" in done.stderr
    _export(tmp_path / "run", tmp_path / "out", "--step=best")
    wanted = _our_logits(tmp_path / "run" / "checkpoints" / "step_00000002")
    for folder in (tmp_path / "out", tmp_path / "run" / "export"):
        assert (_logits(folder) - wanted).abs().max() < 1e-5
