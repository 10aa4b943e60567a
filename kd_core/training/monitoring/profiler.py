"""Traces of a few steps by torch's profiler, to open in Perfetto or chrome://tracing."""

import contextlib
import logging
from collections.abc import Generator
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("kd")
PASSED_OVER = 2  # steps: the first one allocates memory, and the first one under the profiler is slow


@contextlib.contextmanager
def trace_steps(steps: int, folder: Path, rank: int) -> Generator[None]:
    """Traces `steps` steps inside of the block into `folder`/rank_N.json, from the third step on.

    A step ends with the step of an optimiser. With `steps` 0, nothing is traced.
    """
    if not steps:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank}.json"

    def write(finished: profile) -> None:
        finished.export_chrome_trace(str(path))
        log.info("%s: the trace of %d steps; open it in Perfetto or chrome://tracing", path, steps)

    def on_step_end(*_: object) -> None:
        trace.step()

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    phases = schedule(wait=PASSED_OVER - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=write) as trace:
        hook = register_optimizer_step_post_hook(on_step_end)
        try:
            yield
        finally:
            hook.remove()
