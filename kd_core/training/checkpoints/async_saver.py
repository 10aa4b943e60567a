"""Asynchronous checkpoints: the training thread copies the state to memory, and another thread writes the copy.

At most one checkpoint is being written at a time. The writing threads of the ranks use a process group of their own,
so that their collectives never mix with those of the training.
"""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from kd_core.parallel.world import World, use_device
from kd_core.students.student import Student
from kd_core.training.checkpoints.checkpoint import CheckpointContent, Progress, delete_superseded, write
from kd_core.training.checkpoints.checkpoint_settings import Checkpoint
from kd_core.training.checkpoints.checkpoint_state import frozen_norms, run_state
from kd_core.training.checkpoints.host_buffers import HostBuffers, copy_to_cpu
from kd_core.training.monitoring.hang_watchdog import Pulse

PROGRESS_SECONDS = 1.0  # between two looks at the bytes written


class Saver:
    """The writer of one run's checkpoints, which also deletes those that the policy does not keep.

    All ranks create it together. `record` is the text of the run's config.json.
    """

    def __init__(self, root: Path, policy: Checkpoint, record: str, world: World, pulse: Pulse) -> None:
        self.root, self.policy, self.record, self.world, self.pulse = root, policy, record, world, pulse
        self.group: dist.ProcessGroup | None = None
        if world.size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self.group = group
        # DCP asks for a stream of the thread's GPU, which is GPU 0 in a new thread.
        self.thread = ThreadPoolExecutor(1, "saving", initializer=use_device, initargs=(world.device,))
        self.pending: Future[None] | None = None
        self.buffers = HostBuffers()
        self.frozen: dict[str, float] | None = None
        self.last_step: int | None = None

    def save(self, progress: Progress, model: Student, optimizer: torch.optim.Optimizer) -> None:
        """Begins to write `step_N`, after the previous checkpoint is complete. Raises the error of that one, if any."""
        if progress.step == self.last_step:
            return
        self.last_step = progress.step
        self.wait()
        if self.frozen is None:  # they never change, so they are computed once
            self.frozen = frozen_norms(model)
        state = run_state(model, optimizer)
        if self.policy.asynchronous:
            state = copy_to_cpu(state, self.buffers)
        self.pending = self.thread.submit(self._write, CheckpointContent(state, progress, self.frozen, self.record))
        if not self.policy.asynchronous:
            self.wait()

    def _write(self, content: CheckpointContent) -> None:
        write(self.root, content, self.world, self.group)
        if self.world.is_first:
            delete_superseded(self.root, self.policy)

    def _bytes_written(self) -> int:
        """Returns the size of the checkpoint being written. It grows on a slow disk, but not on one that hangs."""
        return sum(file.stat().st_size for file in self.root.glob("step_*.partial/*"))

    def wait(self) -> None:
        """Waits until no checkpoint is being written.

        Raises:
            UsageError: the checkpoint could not be written.
        """
        pending, previous_bytes = self.pending, -1
        if pending is None:
            return
        while wait([pending], PROGRESS_SECONDS).not_done:
            if (current_bytes := self._bytes_written()) != previous_bytes:
                self.pulse.beat()
                previous_bytes = current_bytes
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
