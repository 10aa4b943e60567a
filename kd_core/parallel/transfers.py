"""Copies between host and device that the host does not wait for, and times of it. On the CPU nothing is copied."""

import time
from collections.abc import Generator, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from kd_core.types import Batch


class HostCopy:
    """A copy of a tensor in host memory, which may still be on its way from the device until it is read."""

    def __init__(self, tensor: Tensor) -> None:
        # torch allocates page-locked memory for such a copy, so the host goes on at once.
        self.values = tensor.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if tensor.device.type == "cuda" else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> list[float]:
        """Returns the values once they have arrived, without waiting for work that was enqueued behind them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class Stopwatch:
    """A time from its start to its stop: by the host on the CPU, and on a GPU between two points of its stream."""

    def __init__(self, device: torch.device) -> None:
        self.started = self.stopped = time.perf_counter()
        is_gpu = device.type == "cuda"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if is_gpu else []
        if self.events:
            self.events[0].record()

    def stop(self) -> None:
        """Stops it behind the work that is enqueued, without waiting for it."""
        self.stopped = time.perf_counter()
        if self.events:
            self.events[1].record()

    def seconds(self) -> float:
        """Returns the seconds from start to stop. Waits for a GPU to get there."""
        if not self.events:
            return self.stopped - self.started
        start, stop = self.events
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


@lru_cache(1)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def device_batches(batches: Iterable[Batch], device: torch.device) -> Generator[Batch]:
    """Yields the batches on a device. A side stream of a GPU copies each while the one before computes."""
    if device.type == "cpu":
        yield from batches
        return
    side, compute = _copy_stream(device), torch.cuda.current_stream(device)

    def copy(batch: Batch) -> Batch:
        with torch.cuda.stream(side):
            return batch.map(lambda tensor: tensor.to(device, non_blocking=True))

    def mark_used(tensor: Tensor) -> Tensor:
        tensor.record_stream(compute)  # the side stream may reuse the memory only when this stream has read it
        return tensor

    copies = map(copy, batches)
    upcoming = next(copies, None)
    while (current := upcoming) is not None:
        # Wait for the copy of this batch, then enqueue the next one, which is not waited for.
        compute.wait_stream(side)
        upcoming = next(copies, None)
        yield current.map(mark_used)
