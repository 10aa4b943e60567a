"""Killed at twenty random moments of export and of training, started again each time: the same bytes and numbers.

Opt-in: `make test-slow`. On the tiny teacher; moments are drawn over the whole life of the process.
"""

import random
import time
from pathlib import Path

import pytest

from tests.launchers.command import configs, kill_when, line, run
from tests.launchers.test_commands import _values
from tests.tiny import Tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
KILLS = 20


def _kill_often(command: list[str], life: float) -> int:
    """Kills that struck before the work had ended."""
    moments = random.Random(0)
    ends = (time.monotonic() + moments.uniform(0.3, 1) * life for _ in range(KILLS))
    return sum(kill_when(command, lambda end=end: time.monotonic() > end) for end in ends)


def test_training(tiny: Tiny, tmp_path: Path) -> None:
    flags = configs([*tiny.train_items(1200), "checkpoint.every=20", "evaluation.every=100"])
    whole = run("launchers.train", *flags, f"--run_dir={tmp_path / 'whole'}", nproc=1)
    assert whole.returncode == 0, whole.stderr
    assert _kill_often(line("launchers.train", *flags, f"--run_dir={tmp_path / 'cut'}", nproc=1), life=6.0) > KILLS // 2
    done = run("launchers.train", *flags, f"--run_dir={tmp_path / 'cut'}", nproc=1)
    assert done.returncode == 0, done.stderr
    assert _values(tmp_path / "cut") == _values(tmp_path / "whole")
    assert (tmp_path / "cut" / "export" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "export" / "model.safetensors"
    ).read_bytes()


def test_export(tiny: Tiny, tmp_path: Path) -> None:
    settings = [f"corpus.path={tiny.corpus}", f"teacher={tiny.teacher}", "selection.top_k=8", "row_length=32"]
    flags = configs(["quickstart_export", *settings, "block_positions=64", "shard_bytes=1000", "train_tokens=none"])
    whole = run("launchers.export_teacher", *flags, f"--out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert _kill_often(line("launchers.export_teacher", *flags, f"--out={tmp_path / 'cut'}"), life=3.0) > KILLS // 4
    done = run("launchers.export_teacher", *flags, f"--out={tmp_path / 'cut'}")
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path
