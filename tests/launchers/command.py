"""Commands as a user starts them, in processes of their own."""

import csv
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

import experiments
from experiments.config import catalog, user_code
from experiments.config import paths as values_of_graphs
from kd_core.training.monitoring.metric_log import read_metrics
from tests.forks import start_server
from tests.patience import patience


def line(module: str, *arguments: str, nproc: int | None = None, torchrun: Sequence[str] = ()) -> list[str]:
    """The command line, under torchrun with some options of its own where there is an `nproc`."""
    if nproc is None:
        return [sys.executable, "-m", module, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return [sys.executable, *launcher, *torchrun, "-m", module, *arguments]


def look_in(folder: Path) -> None:
    """Have this process, which is a command's own, look for names in another folder than our `experiments/`."""
    catalog.FOLDER = user_code.FOLDER = values_of_graphs.FOLDER = folder
    experiments.__path__ = [str(folder)]


def _become(
    argv: list[str], environment: dict[str, str], cwd: Path, output: Path, before: Callable[[], None] | None
) -> None:
    """What `python -m` does, with what it prints in files."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = argv
    if before is not None:
        before()
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


class Command:
    """A command at work in a process of its own, or in one per rank, joined as torchrun joins them.

    The processes are forked, and call `before` first. What torchrun does beyond that (restarts, signals) is for `line`.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        nproc: int | None = None,
        cwd: Path | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.argv = [module, *arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._output, self._store, joined = Path(self._folder.name), None, {}
        for name in ("stdout", "stderr"):
            (self._output / name).touch()
        if nproc is not None:
            self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            joined = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self._store.port), "WORLD_SIZE": str(nproc)}
            joined |= {"LOCAL_WORLD_SIZE": str(nproc), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        context = multiprocessing.get_context(start_server())
        self._ranks = []
        for rank in range(nproc or 1):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": "0"} if joined else {}
            given = (self.argv, {**joined, **numbers}, cwd or Path.cwd(), self._output, before)
            self._ranks.append(context.Process(target=_become, args=given))
            self._ranks[-1].start()

    def poll(self) -> int | None:
        """The exit status of all ranks, or of the first that failed; None while one is at work."""
        codes = [process.exitcode for process in self._ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def kill(self) -> None:
        for process in self._ranks:
            process.kill()

    def wait(self) -> int:
        """Wait for the end of all ranks; then there is what they printed."""
        for process in self._ranks:
            process.join()
        with self._folder:
            self.stdout, self.stderr = ((self._output / name).read_text() for name in ("stdout", "stderr"))
        return self.poll() or 0

    def done(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """As it ended, and what it printed."""
        deadline = time.monotonic() + seconds
        for process in self._ranks:
            process.join(max(0, deadline - time.monotonic()))
        late = self.poll() is None
        self.kill()
        status = self.wait()
        assert not late, f"not ended after {seconds:.0f} s: {self.stderr}"
        return subprocess.CompletedProcess(self.argv, status, self.stdout, self.stderr)


def run(module: str, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return Command(module, *arguments, **settings).done(patience(100))


def configs(items: list[str]) -> list[str]:
    """As flags."""
    return [f"--config={item}" for item in items]


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def until(ready: Callable[[], bool], process: Command | subprocess.Popen[Any], seconds: float = 90) -> bool:
    """Wait until `ready`; False if the process ended before."""
    deadline = time.monotonic() + patience(seconds)
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, "never ready"
        time.sleep(0.002)
    return process.poll() is None


def kill_when(process: Command | subprocess.Popen[Any], ready: Callable[[], bool], seconds: float = 90) -> bool:
    """SIGKILL it once `ready`; False if it ended before."""
    try:
        return until(ready, process, seconds)
    finally:
        process.kill()
        process.wait()


def values(run_dir: Path) -> list[dict[str, float]]:
    """A run's numbers as far as a repeated run repeats them: everything but times."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in found.items() if not name.startswith("speed/")} for found in lines]
