"""A run on three ranks, started and finished many times while the cores are busy: status 0, and no message at its end.

Opt-in: `make test-slow`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.command import configs, run
from tests.tiny import Tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
ENDS = 200
SPIN = "while True: pass"


def test_a_finished_run_ends_with_status_0(tiny: Tiny, tmp_path: Path) -> None:
    items = [*tiny.train_items(2), "evaluation.prompts=()"]
    busy = [subprocess.Popen([sys.executable, "-S", "-c", SPIN]) for _ in range(os.cpu_count() or 1)]
    try:
        for number in range(ENDS):
            folder = tmp_path / f"run_{number}"
            done = run("launchers.train", *configs(items), f"--run_dir={folder}", nproc=3, timeout=300)
            (tmp_path / "ended.txt").write_text(str(number + 1))
            assert done.returncode == 0, (number, done.stderr)
            assert done.stderr.splitlines()[-1] == f"done: {folder}", (number, done.stderr)
    finally:
        for process in busy:
            process.kill()
            process.wait()
