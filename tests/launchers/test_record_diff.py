"""A run again from its record: the same numbers; and what differs is said before it starts, kind by kind."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest

from experiments.base.experiment import Experiment
from experiments.config import config_items, record_diff
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder, attempt_facts
from tests.launchers.command import configs, run
from tests.tiny import Tiny

RUNS = {
    "as it is": [],
    "another objective": ["loss.terms.kd.divergence=reverse_kl", "loss.terms.sft.weight=0", "seed=3"],
    "by fiddler and tag": ["fiddler:short(steps=4)", "tag:TopK=3"],
}


def _numbers(run_dir: Path) -> list[dict[str, float]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in lines]


@pytest.mark.parametrize("more", RUNS.values(), ids=RUNS)
def test_a_run_again_from_its_record_has_the_same_numbers(tiny: Tiny, tmp_path: Path, more: list[str]) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    done = run("launchers.train", *configs([*tiny.train_items(4), *more]), f"--run_dir={first}")
    assert done.returncode == 0, done.stderr
    done = run("launchers.train", f"--config=run:{first}", f"--run_dir={again}")
    assert done.returncode == 0, done.stderr
    assert _numbers(again) == _numbers(first)
    assert (again / "config.json").read_bytes() == (first / "config.json").read_bytes()
    assert str(first) in done.stderr


def test_a_dry_run_says_what_differs(tiny: Tiny, tmp_path: Path) -> None:
    first = tmp_path / "first"
    done = run("launchers.train", *configs(tiny.train_items(4)), f"--run_dir={first}")
    assert done.returncode == 0, done.stderr
    dry = run("launchers.train", f"--config=run:{first}", "--dry_run", "--world=2", "--config=steps=5")
    assert f"differs from the run it repeats, {first}:" in dry.stdout, dry.stderr
    assert "layout size: 1 there, 2 now" in dry.stdout
    assert "setting steps: 4 there, 5 now (--config=steps=5)" in dry.stdout


@pytest.fixture
def recorded(tiny: Tiny, tmp_path: Path) -> tuple[config_items.Resolved, dict[str, Any]]:
    """The record of a run that was started, resolved again, and the facts of that start."""
    shutil.copytree(tiny.train, tmp_path / "cache")
    resolved = config_items.resolve_items([*tiny.train_items(), f"shards.path={tmp_path / 'cache'}"], "Experiment")
    experiment: Experiment = fdl.build(resolved.config)
    facts = {**attempt_facts(World(), experiment.inputs()), "commit": "c0ffee"}
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.claim(config_items.record_json(resolved.config), config_items.describe(resolved))
    folder.begin_attempt(facts)
    return config_items.resolve_items([f"run:{folder.path}"], "Experiment"), facts


def test_nothing_differs_where_nothing_does(recorded: tuple[config_items.Resolved, dict[str, Any]]) -> None:
    assert "the same bits are expected" in record_diff.report(*recorded)


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"commit": "badcab"}, "code commit: c0ffee there, badcab now"),
    "python": ({"python": "2.7.18"}, "version of python: "),
    "a package": ({"versions": {"torch": "1.0"}}, "version of torch: "),
    "ranks": ({"world": {"size": 2, "device": "cpu", "pid": 1}}, "layout size: 1 there, 2 now"),
    "the device": ({"world": {"size": 1, "device": "cuda", "pid": 1}}, "layout device: cpu there, cuda now"),
    "another cache": (
        {"inputs": {"shards.path": {"path": "cache", "sha256": "0" * 64}}}, "data shards.path: sha256 ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_what_differs_is_said(
    recorded: tuple[config_items.Resolved, dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    resolved, facts = recorded
    found = record_diff.report(resolved, {**copy.deepcopy(facts), **change})
    assert found.startswith("differs from the run it repeats")
    assert message in found


def test_uncommitted_changes_are_no_proof_of_the_same_code(
    recorded: tuple[config_items.Resolved, dict[str, Any]],
) -> None:
    resolved, facts = recorded
    dirty = {**facts, "commit": "c0ffee-dirty"}
    assert any("not committed" in line for line in record_diff.differences(resolved, dirty, dirty, ""))
    unknown = {**facts, "commit": "unknown"}
    assert any("commit: not known" in line for line in record_diff.differences(resolved, unknown, unknown, ""))


def test_a_cache_or_a_student_of_other_bytes_is_another_input(
    recorded: tuple[config_items.Resolved, dict[str, Any]], tiny: Tiny, tmp_path: Path
) -> None:
    resolved, facts = recorded
    path = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["statistics"]["teacher_nll"] += 1.0
    path.write_text(json.dumps(manifest))
    shutil.copytree(tiny.teacher, tmp_path / "student")
    weights = tmp_path / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    resolved.config.student.folder = str(tmp_path / "student")
    experiment: Experiment = fdl.build(resolved.config)
    found = record_diff.report(resolved, {**facts, "inputs": experiment.inputs()})
    assert "data shards.path: sha256" in found
    assert "data student.folder: sha256" in found
    assert "data evaluation.shards.path" not in found


def test_a_value_that_is_changed_now_is_said_with_its_flag(
    recorded: tuple[config_items.Resolved, dict[str, Any]],
) -> None:
    resolved, facts = recorded
    changed = config_items.resolve_items([f"run:{resolved.repeats}", "steps=9"], "Experiment")
    assert "setting steps: 6 there, 9 now (--config=steps=9)" in record_diff.report(changed, facts)


def test_a_default_of_another_day_is_said_and_the_recorded_one_is_kept(
    recorded: tuple[config_items.Resolved, dict[str, Any]],
) -> None:
    resolved, facts = recorded
    folder = resolved.repeats
    assert folder is not None
    for name, old, new in (("config.json", "1e-08", "1e-05"), ("config.txt", "1e-08", "1e-05")):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    found = record_diff.report(config_items.resolve_items([f"run:{folder}"], "Experiment"), facts)
    assert "default of AdamW.eps: 1e-05 there, which is kept; 1e-08 in today's code" in found


def test_a_setting_that_is_newer_than_the_record_is_said(
    recorded: tuple[config_items.Resolved, dict[str, Any]],
) -> None:
    resolved, facts = recorded
    folder = resolved.repeats
    assert folder is not None
    text = (folder / "config.txt").read_text()
    (folder / "config.txt").write_text("".join(x for x in text.splitlines(True) if not x.startswith("optimizer.eps")))
    assert "setting optimizer.eps: not in the record; 1e-08 now" in record_diff.report(resolved, facts)


def test_a_run_without_attempts_is_refused_with_what_to_do(
    recorded: tuple[config_items.Resolved, dict[str, Any]],
) -> None:
    resolved, facts = recorded
    assert resolved.repeats is not None
    shutil.rmtree(resolved.repeats / "attempts")
    with pytest.raises(UsageError, match="use config_file: instead"):
        record_diff.report(resolved, facts)


def test_its_folder_has_a_name_of_its_own(recorded: tuple[config_items.Resolved, dict[str, Any]]) -> None:
    assert recorded[0].name == "run_again"
