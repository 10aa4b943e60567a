"""Copies between host and device: none on the CPU, and on a GPU each batch while the one before computes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kd_core.parallel import transfers
from kd_core.parallel.transfers import HostCopy, Stopwatch, device_batches
from kd_core.types import Batch
from tests.kd_core.parallel.test_layouts import rows_of

BATCHES = [rows_of(0, [row]) for row in range(4)]


def test_on_the_cpu_nothing_is_copied() -> None:
    assert all(got is batch for got, batch in zip(device_batches(BATCHES, torch.device("cpu")), BATCHES, strict=True))
    values = torch.tensor([1.5, -0.0], dtype=torch.float64)
    assert HostCopy(values).values is values
    assert str(HostCopy(values).read()) == "[1.5, -0.0]"


class Stream(torch.cpu.Stream):
    """A stream that does nothing but have a name, and note what waits for it."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def wait_stream(self, stream: object) -> None:
        assert isinstance(stream, Stream)
        self.calls.append(f"{self.name} waits for {stream.name}")


class Gpu:
    """The meta device in a GPU's place: its two streams, and in order what is done on which of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.compute, self.side = (Stream(name, self.calls) for name in ("compute", "side"))
        self.current = self.compute
        self.copied: set[tuple[str, bool]] = set()  # the stream of a copy, and whether the host goes on
        self.used: list[Stream] = []
        self.copy_of_tensor = torch.Tensor.to
        transfers._copy_stream.cache_clear()
        patch.setattr(torch.cuda, "Stream", lambda _: self.side)
        patch.setattr(torch.cuda, "current_stream", lambda _: self.compute)
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(
            torch.Tensor, "to", lambda tensor, device, non_blocking=False: self.to(tensor, device, non_blocking)
        )
        patch.setattr(torch.Tensor, "record_stream", lambda _, stream: self.used.append(stream))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def to(self, tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        self.copied.add((self.current.name, non_blocking))
        return self.copy_of_tensor(tensor, device)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    yield Gpu(monkeypatch)
    transfers._copy_stream.cache_clear()


def test_a_gpu_copies_one_batch_ahead_and_waits_for_none_but_the_one_it_needs(gpu: Gpu) -> None:
    def noted() -> Iterator[Batch]:
        for number, batch in enumerate(BATCHES):
            gpu.calls.append(f"copy {number}")
            yield batch

    for number, batch in enumerate(device_batches(noted(), torch.device("meta"))):
        gpu.calls.append(f"compute {number}")
        assert gpu.current is gpu.compute
        assert batch.topk_log_probs.device.type == "meta"
        assert batch.topk_log_probs.shape == BATCHES[number].topk_log_probs.shape
    wait = "compute waits for side"
    assert gpu.calls == [
        "copy 0", wait, "copy 1", "compute 0", wait, "copy 2", "compute 1", wait, "copy 3", "compute 2", wait,
        "compute 3",
    ]  # fmt: skip
    assert gpu.copied == {("side", True)}
    # Memory of the side stream stays until the other one has read it.
    assert len(gpu.used) == len(BATCHES) * sum(isinstance(value, torch.Tensor) for value in vars(BATCHES[0]).values())
    assert all(stream is gpu.compute for stream in gpu.used)
    assert not list(device_batches([], torch.device("meta")))


def test_a_stopwatch_of_a_gpu_goes_by_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between events on the GPU, which it is waited for only when the seconds are read."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0

        def record(self) -> None:
            calls.append("record")
            self.at = 1500.0 * len(calls)

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, other: "Event") -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch(torch.device("cuda", 0))
    stopwatch.stop()
    assert calls == ["record", "record"]
    assert stopwatch.seconds() == 1.5
    assert calls[2:] == ["wait"]


def test_a_stopwatch_of_the_cpu_goes_by_the_host() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    time.sleep(0.01)
    stopwatch.stop()
    seconds = stopwatch.seconds()
    time.sleep(0.01)
    assert stopwatch.seconds() == seconds >= 0.01
