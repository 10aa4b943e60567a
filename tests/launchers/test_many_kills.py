"""Killed at thirty random moments of export and of training, started again each time: the same bytes and numbers.

Opt-in: `make test-slow`. On the tiny teacher; moments are drawn over the whole life of the process.
"""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forks import ENVIRONMENT
from tests.launchers.command import configs, kill_when, line, run, values
from tests.patience import patience
from tests.tiny import Tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
KILLS = 30
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
HANG = patience(30)  # seconds without any progress, kills and starts included


def _kill_often(command: list[str], life: float) -> int:
    """Kills that struck before the work had ended."""
    moments = random.Random(0)
    ends = (time.monotonic() + moments.uniform(0.3, 1) * life for _ in range(KILLS))
    return sum(
        kill_when(subprocess.Popen(command, env=ENVIRONMENT, **QUIET), lambda end=end: time.monotonic() > end)
        for end in ends
    )


@dataclass
class _Job:
    """Training on two ranks under torchrun, started again whenever torchrun is gone."""

    command: list[str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def alive(self) -> bool:
        if self.process is None or self.process.poll() not in (None, 0):
            self.process = subprocess.Popen(self.command, env=ENVIRONMENT, start_new_session=True, **QUIET)
            self.starts += 1
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        assert self.process is not None
        try:
            return [
                int(c) for c in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            ]
        except FileNotFoundError:
            return []

    def lines(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saving(self) -> bool:
        return any((self.folder / "checkpoints").glob("step_*.partial"))

    def kill(self, what: str, choice: random.Random) -> bool:
        """Whether it struck."""
        assert self.process is not None
        victims = [self.process.pid] if what == "launcher" else self.ranks()
        try:
            os.kill(choice.choice(victims or [0]) or self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def _until(job: _Job, ready: Callable[[], bool]) -> bool:
    """Wait, starting what is gone; False where the work has ended."""
    deadline = time.monotonic() + HANG
    while not ready():
        if not job.alive():
            return False
        assert time.monotonic() < deadline, f"no progress for {HANG} s"
        time.sleep(0.001)
    return True


def test_training(tiny: Tiny, tmp_path: Path) -> None:
    """Kills of a rank, of torchrun, and of a rank while a checkpoint is being written, each after some more steps.

    Equal numbers of every step mean that each record was seen once, in its place.
    """
    flags = configs([*tiny.train_items(800), "checkpoint.every=20", "evaluation.every=100"])
    whole = run("launchers.train", *flags, f"--run_dir={tmp_path / 'whole'}", nproc=2, timeout=600)
    assert whole.returncode == 0, whole.stderr
    cut = tmp_path / "cut"
    torchrun = [f"--max-restarts={KILLS}"]
    job = _Job(line("launchers.train", *flags, f"--run_dir={cut}", nproc=2, torchrun=torchrun), cut)
    choice, struck = random.Random(0), Counter[str]()
    while sum(struck.values()) < KILLS:
        what = choice.choice(["rank", "launcher", "saving"])
        wanted = job.lines() + choice.randint(1, 25)
        if not _until(job, lambda wanted=wanted: job.lines() >= wanted):
            break
        if what == "saving" and not _until(job, job.saving):
            break
        struck[what] += job.kill(what, choice)
        (tmp_path / "struck.txt").write_text(f"{struck}, at line {job.lines()}, start {job.starts}")
        time.sleep(choice.uniform(0, 2))
    assert sum(struck.values()) == KILLS, f"the run ended after {struck}"
    assert min(struck.values()) > KILLS // 10, struck
    while job.alive():
        time.sleep(0.1)
    assert values(cut) == values(tmp_path / "whole")
    exported = Path("export") / "model.safetensors"
    assert (cut / exported).read_bytes() == (tmp_path / "whole" / exported).read_bytes()


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
