"""Saving beside the training: a copy in memory at the step, and a thread that writes it.

At most one checkpoint is being written; whoever needs it to be there waits. The thread talks to the other ranks'
threads through a group of its own, so its messages never mix with those of the training.
"""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.training.checkpoints.checkpoint import Checkpoint, Content, Progress, keep_some, write
from kd_core.training.checkpoints.checkpoint_state import State, frozen_norms, run_state, staged
from kd_core.training.monitoring.hang_watchdog import Pulse

LOOK_EVERY = 1.0


class Saver:
    """Writes the checkpoints of one run, and deletes those that its policy does not keep."""

    def __init__(self, root: Path, policy: Checkpoint, record: str, world: World, pulse: Pulse) -> None:
        """All ranks together. `record` is the text of the run's config.json."""
        self.root, self.policy, self.record, self.world, self.pulse = root, policy, record, world, pulse
        self.group: dist.ProcessGroup | None = None
        if world.size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self.group = group
        self.thread = ThreadPoolExecutor(1, "saving")
        self.pending: Future[None] | None = None
        self.buffers: State = {}
        self.frozen: dict[str, float] | None = None
        self.last: int | None = None

    def save(self, progress: Progress, model: Decoder, optimizer: torch.optim.Optimizer) -> None:
        """Begin to write `step_N`, once the one before is there; an error of that one is raised here."""
        if progress.step == self.last:
            return
        self.last = progress.step
        self.wait()
        if self.frozen is None:
            self.frozen = frozen_norms(model)
        state = run_state(model, optimizer)
        if self.policy.asynchronous:
            state = staged(state, self.buffers)
        self.pending = self.thread.submit(self._write, Content(state, progress, self.frozen, self.record))
        if not self.policy.asynchronous:
            self.wait()

    def _write(self, content: Content) -> None:
        write(self.root, content, self.world, self.group)
        if self.world.is_first:
            keep_some(self.root, self.policy)

    def _written(self) -> int:
        """Bytes of what is being written, by which a slow disk differs from one that hangs."""
        return sum(file.stat().st_size for file in self.root.glob("step_*.partial/*"))

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            UsageError: it could not be written.
        """
        pending, before = self.pending, -1
        if pending is None:
            return
        while wait([pending], LOOK_EVERY).not_done:
            if (now := self._written()) != before:
                self.pulse.beat()
                before = now
        self.pending = None
        pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            if self.group is not None:
                dist.destroy_process_group(self.group)
                self.group = None
