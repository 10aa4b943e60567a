"""The batches of one step after another. An error of the data waits until all ranks have saved what is done."""

import time
from collections.abc import Callable, Generator, Sequence
from typing import Self

from kd_core.errors import UsageError
from kd_core.parallel.collectives import all_gather_values, raise_on_all_ranks
from kd_core.parallel.world import World
from kd_core.training.checkpoints.checkpoint import Progress
from kd_core.training.monitoring.hang_watchdog import Pulse
from kd_core.types import Batch


class StepReader:
    """Reads each step's batches before ranks agree to go on, so that a rank without data stops all of them.

    Args:
        steps_from: yields the batches of one step after another, behind so many rows.
        done: the steps and rows that are done.
        last: number of the last step.
        pulse: the progress of this rank.

    Raises:
        UsageError, OSError: the data of the first step cannot be read.
    """

    def __init__(
        self, steps_from: Callable[[int], Generator[Sequence[Batch]]], done: Progress, last: int, pulse: Pulse
    ) -> None:
        self.steps, self.step, self.last, self.pulse = steps_from(done.rows), done.step, last, pulse
        self.batches: Sequence[Batch] = ()
        self.waited = 0.0  # seconds for the batches
        self.error: UsageError | OSError | None = None
        self.read_next()
        if self.error:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.steps.close()

    def read_next(self) -> None:
        """Reads the batches of the next step, if there is one, or keeps the error."""
        if self.step == self.last:
            return
        self.step += 1
        self.pulse.enter(f"reading data of step {self.step}")
        started = time.perf_counter()
        try:
            self.batches = next(self.steps)
        except (UsageError, OSError) as error:
            self.error = error
        self.waited = time.perf_counter() - started

    def raise_error(self, world: World, saved_step: int) -> None:
        """Raises the error of the lowest rank that has one, on all ranks. Does nothing where no rank has one."""
        messages = all_gather_values(world, str(self.error) if self.error else None)
        failed = [f"rank {rank}: {text}" if rank else text for rank, text in enumerate(messages) if text is not None]
        done = f"Step {saved_step} is saved, and the same command goes on from there."
        raise_on_all_ranks(world, f"{failed[0]} {done}" if failed else None)
