"""The progress of a run: one live line in the terminal, or lines of the log if stderr is no terminal."""

import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from tqdm import tqdm

from kd_core.parallel.world import World

log = logging.getLogger("kd")
GIB = 1 << 30
FORMAT = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}"


def memory_gib(device: torch.device) -> float:
    """Returns the memory of this process: the peak allocation on a GPU, or the resident memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # without /proc, only the peak is available
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def format_metrics(values: dict[str, float]) -> str:
    """Returns a step's metrics as one line, without those that a skipped step does not have."""
    losses = {name: name.removeprefix("train/") for name in values if name.startswith("train/")}
    losses = {name: short for name, short in losses.items() if short == "loss" or short.endswith("_loss")}
    ordered = sorted(losses, key=lambda name: losses[name] != "loss")
    shown = [f"{losses[name].removesuffix('_loss')} {values[name]:.3f}" for name in ordered]
    forms = {
        "train/lr": "lr {:.2e}",
        "speed/tokens_per_second": "{:.0f} tok/s",
        "speed/data_wait_share": "{:.0%} waiting",
        "speed/memory_gib": "{:.2f} GiB",
    }
    shown += [form.format(values[name]) for name, form in forms.items() if name in values]
    if "speed/eta_seconds" in values:
        shown.append(f"ETA {tqdm.format_interval(values['speed/eta_seconds'])}")
    return ", ".join(shown)


class ProgressLine:
    """The progress line of the first rank. Other ranks show nothing.

    If stderr is no terminal, the first, the last and every `every`-th step is a line of the log instead.
    """

    def __init__(self, steps: int, done: int, every: int, world: World) -> None:
        self.steps, self.done, self.every, self.world = steps, done, every, world
        self.started = time.perf_counter()
        is_live = world.is_first and sys.stderr.isatty()
        self.bar: tqdm[NoReturn] | None = None
        if is_live:
            options: dict[str, Any] = {"mininterval": 1, "bar_format": FORMAT, "dynamic_ncols": True}
            self.bar = tqdm(total=steps, initial=done, desc="distil", **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def speed(self, step: int, seconds: float, waited: float) -> dict[str, float]:
        """Returns the speed metrics of a step that took `seconds` after it `waited` for its data.

        The time left is estimated from the mean time of a step so far, validation and checkpoints included.
        """
        seconds_per_step = (time.perf_counter() - self.started) / (step - self.done)
        return {
            "speed/data_wait_seconds": waited,
            "speed/data_wait_share": waited / max(1e-9, waited + seconds),
            "speed/memory_gib": memory_gib(self.world.device),
            "speed/eta_seconds": seconds_per_step * (self.steps - step),
        }

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows the metrics of a finished step."""
        if self.bar is not None:
            self.bar.set_postfix_str(format_metrics(values), refresh=False)
            self.bar.update()
        elif self.world.is_first and (step % self.every == 0 or step in (self.done + 1, self.steps)):
            log.info("step %d of %d: %s", step, self.steps, format_metrics(values))
