"""Processes that begin with torch and the framework imported: forked from one that has done so once.

A fresh interpreter spends two to four seconds of CPU on imports, before the first line of a test's own work.
"""

import contextlib
import functools
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parent.parent
# One thread each, and a torchrun of the tests' own Python.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
# macOS' own libraries do not bear a fork.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.tensor",
    "data.export.export",
    "data.teacher.choose_scorer",
    "data.stream.stream",
    "experiments.base.experiment",
    "kd_core.training.monitoring.profiler",
    "kd_core.training.monitoring.tensorboard",
    "experiments.config.config_items",
    "tests.launchers.command",
]
# The cores of this process, before it was bound to one of them.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def bind(cores: list[int], number: int) -> None:
    """Bind this process, and what it starts, to one core: commands compute with as many threads as they have cores.

    Threads that wait for each other over matrices of 32 × 32 take ten times as long, and longer on busy cores.
    """
    if cores:
        os.sched_setaffinity(0, {cores[number % len(cores)]})


@functools.cache
def start_server() -> str:
    """Start the process that forks the others, and return the start method for `multiprocessing`."""
    if METHOD == "forkserver":
        multiprocessing.set_forkserver_preload(PRELOADED)
        os.environ.update(ENVIRONMENT)
        forkserver.ensure_running()
    return METHOD


def child_processes() -> set[str]:
    """Return the ids of this process's children, on Linux. A thread that ends meanwhile has none of its own."""
    children: set[str] = set()
    for thread in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children.update(thread.read_text().split())
    return children
