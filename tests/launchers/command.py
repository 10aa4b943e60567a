"""Commands as a user starts them, in processes of their own."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kd_core.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
# One thread each; a torchrun of the tests' own Python.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def line(module: str, *arguments: str, nproc: int | None = None, torchrun: Sequence[str] = ()) -> list[str]:
    """The command line, under torchrun with some options of its own where there is an `nproc`."""
    if nproc is None:
        return [sys.executable, "-m", module, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return [sys.executable, *launcher, *torchrun, "-m", module, *arguments]


def run(
    module: str,
    *arguments: str,
    nproc: int | None = None,
    cwd: Path | None = None,
    timeout: float = 100,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end, with more variables in its environment."""
    command = line(module, *arguments, nproc=nproc)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**ENVIRONMENT, **(environment or {})},
        timeout=timeout,
        check=False,
    )


def configs(items: list[str]) -> list[str]:
    """As flags."""
    return [f"--config={item}" for item in items]


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def kill_when(command: list[str], ready: Callable[[], bool], cwd: Path | None = None, seconds: float = 90) -> bool:
    """Start, wait until `ready`, and SIGKILL the whole process group; False if the command ended before."""
    process = subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + seconds
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, "never ready"
        time.sleep(0.002)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive


def values(run_dir: Path) -> list[dict[str, float]]:
    """A run's numbers as far as a repeated run repeats them: everything but times."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in found.items() if not name.startswith("speed/")} for found in lines]
