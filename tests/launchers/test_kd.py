"""One command for all, whatever lies in the current folder; and lines that are typed otherwise than documented."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from launchers import kd
from tests.launchers.command import configs, run
from tests.tiny import Tiny

ROOT = Path(__file__).parents[2]


def _started(*line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, which finds the project as an installed one is found: behind the current folder."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *line], cwd=cwd, env=given, capture_output=True, text=True, check=False)


def test_every_command_is_listed_with_its_first_line() -> None:
    known = kd.commands()
    assert {"train", "export-teacher", "evaluate", "inspect", "compare", "sweep", "convert", "importance"} <= set(known)
    assert "kd" not in known
    assert known["train"] == "Distil a student from a teacher's cache."
    assert all(known.values())


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 0, "  export-teacher  Run a teacher over a corpus once"),
        (["--help"], 0, "  train  "),
        (["trian"], 2, "kd: error: no command 'trian'. Did you mean 'train'?"),
        (["export_teacher"], 1, "kd export-teacher: error: no --config given."),
        (["train", "--run_dri=x"], 2, "kd train: error: unknown flag --run_dri. Did you mean 'run_dir'?"),
        (["train", "quickstart_export"], 1, "It is an export: kd export-teacher --config=quickstart_export"),
        (["train", "--help"], 0, "torchrun --nproc-per-node 2 --no-python kd train --config=quickstart"),
        (["sweep", "steps=5"], 2, "Did you mean --config=steps=5?"),
    ],
)
def test_what_it_says(in_tmp: Path, arguments: list[str], status: int, said: str) -> None:
    done = run("launchers.kd", *arguments, cwd=in_tmp)
    assert done.returncode == status, done.stderr
    assert said in (done.stdout + done.stderr).replace("\n  train" + " " * 11, "\n  train  ")
    assert "python -m" not in done.stdout
    assert "Traceback" not in done.stderr


def test_names_of_ours_in_the_current_folder_are_told_and_evaded(in_tmp: Path) -> None:
    (in_tmp / "data.py").write_text("raise RuntimeError('not ours')")
    clash = _started("-m", "launchers.train", "--list", cwd=in_tmp)
    assert clash.returncode == 1
    assert f"{in_tmp}/data.py shadows the package data of {ROOT}" in clash.stderr
    assert "Traceback" not in clash.stderr
    fine = _started("-m", "launchers.train", "--list", cwd=in_tmp, PYTHONSAFEPATH="1")
    assert fine.returncode == 0
    (in_tmp / "data.py").unlink()
    (in_tmp / "experiments").mkdir()  # no package, so that ours is found behind it
    assert _started("-m", "launchers.train", "--list", cwd=in_tmp).returncode == 0
    (in_tmp / "experiments/__init__.py").touch()
    assert f"{in_tmp}/experiments/__init__.py shadows" in _started("-m", "launchers.train", cwd=in_tmp).stderr


@pytest.mark.parametrize("name", ["train", "inspect"])
def test_a_command_that_is_started_by_its_file_starts(in_tmp: Path, name: str) -> None:
    done = _started("-u", str(ROOT / "launchers" / f"{name}.py"), "--help", cwd=in_tmp, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert f"python -m launchers.{name} " in done.stdout


def test_our_folder_on_the_path_is_named(in_tmp: Path) -> None:
    done = _started("-c", "import dataclasses", cwd=in_tmp, PYTHONPATH=str(ROOT / "launchers"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {ROOT}/launchers/inspect.py shadows the standard library's inspect.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps=5"], "unknown flag --steps. A value of the experiment is set by --config=steps=5."),
        (["--optimizer.lr=1"], "set by --config=optimizer.lr=1."),
        (["steps=5"], "as in --config=quickstart --config=steps=5."),
        (["--config=steps=5"], "as in --config=quickstart --config=steps=5."),
        (["quickstart", "--steps", "5"], "unknown flag --steps."),
    ],
)
def test_a_value_without_its_flag_is_answered_with_the_line(in_tmp: Path, arguments: list[str], said: str) -> None:
    done = run("launchers.train", *arguments, cwd=in_tmp)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_items_without_their_flag_are_understood_in_any_order(in_tmp: Path) -> None:
    shown = [
        run("launchers.train", *line, "--print_config", cwd=in_tmp).stdout.partition("\nsteps = ")[2].partition(" ")[0]
        for line in (["quickstart", "steps=5"], ["steps=6", "quickstart"], ["steps=7", "--config=quickstart"])
    ]
    assert shown == ["5", "6", "7"]


def _live_in(home: Path) -> None:
    os.environ["HOME"] = str(home)


def test_the_home_folder_behind_a_flag(tiny: Tiny, in_tmp: Path) -> None:
    home = in_tmp / "home"
    home.mkdir()
    for name in ("cache", "teacher"):
        (home / name).symlink_to(tiny.root / name)
    (home / "mine.py").write_text(
        "from experiments.half_depth import quickstart as of\n\n\ndef mine():\n    return of()\n"
    )
    here = partial(_live_in, home)
    items = ["~/mine.py:mine", *tiny.train_items(1)[1:], "schedule.warmup_steps=1", "tag:Interval=1"]
    items += ["student.folder=~/teacher", 'fiddler:cache(folder="~/cache")']
    done = run("launchers.train", *configs(items), "--run_dir=~/runs/x", cwd=in_tmp, before=here)
    assert done.returncode == 0, done.stderr
    assert (home / "runs/x/export/model.safetensors").exists()
    assert not (in_tmp / "~").exists()
    again = run("launchers.train", "--config=run:~/runs/x", "--dry_run", cwd=in_tmp, before=here)
    assert "the same bits are expected" in again.stdout, again.stderr
    measured = run("launchers.evaluate", "--student=~/runs/x", "--cache=~/cache/validation", cwd=in_tmp, before=here)
    assert measured.returncode == 0, measured.stderr
