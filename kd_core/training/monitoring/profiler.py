"""Where the time of a few steps goes: a trace of torch's profiler, to open in Perfetto or chrome://tracing."""

import contextlib
import logging
from collections.abc import Generator
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("kd")
PASSED_OVER = 2  # steps: the first allocate, and the profiler's own first is slow


@contextlib.contextmanager
def profiled(steps: int, folder: Path, rank: int) -> Generator[None]:
    """Trace `steps` steps, from this start's third on, into `folder`/rank_N.json; 0 traces nothing.

    What ends a step is an optimiser's.
    """
    if not steps:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank}.json"

    def write(found: profile) -> None:
        found.export_chrome_trace(str(path))
        log.info("%s: the trace of %d steps; open it in Perfetto or chrome://tracing", path, steps)

    def ended(*_: object) -> None:
        trace.step()

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    when = schedule(wait=PASSED_OVER - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=write) as trace:
        hook = register_optimizer_step_post_hook(ended)
        try:
            yield
        finally:
            hook.remove()
