"""What a training step costs outside of forward, backward and optimiser: data, metrics, logging, saving.

    python -m benchmarks.overheads                                   # a tiny student, for which everything is overhead
    python -m benchmarks.overheads --quickstart quickstart --steps 12   # the 81M student of `make quickstart`

A real run of the experiment, by its own loop, in a folder that is thrown away. The parts are timed where the loop
calls them; "rest" is everything of the loop that is no part. A step's own time is that of `begin_step`: forward,
backward, sums over ranks, optimiser. Validation is left out. Bar: 2% for the student of the quick start, without
the copy of a checkpoint, which stands beside: it is paid once in `checkpoint.every` steps.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import fiddle as fdl
import torch

from experiments.config import config_items
from kd_core.parallel.world import World
from kd_core.training import loop
from kd_core.training.checkpoints import async_saver
from kd_core.training.checkpoints.async_saver import Saver
from kd_core.training.monitoring.metric_log import MetricLog
from kd_core.training.run_folder import RunFolder
from kd_core.training.step_reader import StepReader
from kd_core.training.stop_signals import StopSignals
from tests.tiny import make_tiny

BAR = 0.02
STEP, DATA, LINES, AGREE, SAVE, COPY = (
    "begin_step",
    "data",
    "metrics, TensorBoard",
    "told to stop?",
    "save",
    "copy of save",
)
VALIDATION = "validation"
PARTS = {
    STEP: (loop, "begin_step"),
    LINES: (MetricLog, "add"),
    AGREE: (StopSignals, "agree_on_stop"),
    SAVE: (Saver, "save"),
    COPY: (async_saver, "copy_to_cpu"),
    VALIDATION: (loop, "evaluate_all"),
}


@dataclass
class Clock:
    """Seconds by part, each time that the loop came by."""

    seen: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seen[name].append(time.perf_counter() - started)

        return call


def measure(items: list[str], clock: Clock) -> tuple[float, list[float]]:
    """Seconds of the loop from its first step to its last, and of waiting for data by step."""
    config = config_items.resolve_items(items, "Experiment").config
    experiment = fdl.build(config)
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, clock.timed(name, getattr(owner, attribute)))
    read_next, leave, waits, started, ended = StepReader.read_next, StepReader.__exit__, [], 0.0, 0.0

    def noted(reader: Any) -> None:
        nonlocal started
        started, step = started or time.perf_counter(), reader.step
        read_next(reader)
        if reader.step > step:
            waits.append(reader.waited)

    def left(reader: Any, *error: Any) -> None:
        nonlocal ended
        ended = time.perf_counter()  # before the wait for the last checkpoint
        leave(reader, *error)

    StepReader.read_next, StepReader.__exit__ = noted, left
    with tempfile.TemporaryDirectory() as folder:
        run_folder = RunFolder(Path(folder))
        run_folder.claim(config_items.record_json(config), "")
        experiment.run(run_folder, World(), StopSignals())
        return ended - started, waits


def report(total: float, waits: list[float], clock: Clock) -> None:
    seen = {name: clock.seen[name] for name in PARTS}
    seen[VALIDATION], seen[LINES] = seen[VALIDATION][1:], seen[LINES][1:]  # those of step 0 come before the steps
    steps = len(waits)
    whole = total - sum(seen[VALIDATION])
    own = sum(seen[STEP])
    rows = {DATA: sum(waits), LINES: sum(seen[LINES]), AGREE: sum(seen[AGREE])}
    rest = whole - own - sum(rows.values()) - sum(seen[SAVE])
    print(f"{steps} steps of {own / steps * 1e3:.1f} ms (median {median(seen[STEP]) * 1e3:.1f})")
    for name, seconds in [*rows.items(), ("rest", rest)]:
        print(f"{name:24}{seconds / steps * 1e3:10.3f} ms a step{seconds / own:10.2%}")
    outside = (sum(rows.values()) + rest) / own
    print(f"{'outside of the step':24}{outside * own / steps * 1e3:10.3f} ms a step{outside:10.2%}, wanted {BAR:.0%}: "
          f"{'reached' if outside <= BAR else 'not reached'}")  # fmt: skip
    for name in (SAVE, COPY):
        print(f"{name:24}{median(seen[name]) * 1e3:10.1f} ms each, {len(seen[name])} times: "
              + ", ".join(f"{seconds * 1e3:.0f}" for seconds in seen[name]))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", help="folder of the quick start, with teacher/ and cache/")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    args = parser.parse_args()
    common = [
        f"steps={args.steps}",
        f"checkpoint.every={args.every}",
        "evaluation.every=100000",
        "evaluation.prompts=()",
    ]
    with tempfile.TemporaryDirectory() as folder:
        if args.quickstart:
            at = Path(args.quickstart)
            items = ["quickstart", f"student.folder={at / 'teacher'}", f"shards.path={at / 'cache' / 'train'}",
                     f"evaluation.shards.path={at / 'cache' / 'validation'}"]  # fmt: skip
        else:
            items = make_tiny(Path(folder)).train_items()
        student = "the quick start's student" if args.quickstart else "a tiny student"
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {student}")
        clock = Clock()
        report(*measure([*items, *common], clock), clock)


if __name__ == "__main__":
    main()
