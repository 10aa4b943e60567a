"""Commands as a user starts them, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# One thread each; a torchrun of the tests' own Python.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def line(module: str, *arguments: str, nproc: int | None = None) -> list[str]:
    """The command line."""
    if nproc is None:
        return [sys.executable, "-m", module, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return [sys.executable, *launcher, "-m", module, *arguments]


def run(
    module: str, *arguments: str, nproc: int | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    command = line(module, *arguments, nproc=nproc)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=100, check=False)


def configs(items: list[str]) -> list[str]:
    """As flags."""
    return [f"--config={item}" for item in items]


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
