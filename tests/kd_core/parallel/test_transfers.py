"""Copies between host and device: none on the CPU, and on a GPU each batch while the one before computes."""

import pytest
import torch

from kd_core.parallel.transfers import HostCopy, device_batches
from tests.kd_core.parallel.test_layouts import rows_of

BATCHES = [rows_of(0, [row]) for row in range(4)]


def test_on_the_cpu_nothing_is_copied() -> None:
    assert all(got is batch for got, batch in zip(device_batches(BATCHES, torch.device("cpu")), BATCHES, strict=True))
    values = torch.tensor([1.5, -0.0], dtype=torch.float64)
    assert HostCopy(values).values is values
    assert str(HostCopy(values).read()) == "[1.5, -0.0]"


def test_a_gpu_copies_one_batch_ahead_and_waits_for_none_but_the_one_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls, with the meta device in the GPU's place and the CPU's streams, which do nothing."""
    calls: list[str] = []

    class Stream(torch.cpu.Stream):
        def wait_stream(self, stream: object) -> None:
            assert isinstance(stream, Stream)
            calls.append("wait")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.cpu.stream(torch.cpu.Stream()))
    used = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: used.append(tensor))

    def noted() -> object:
        for number, batch in enumerate(BATCHES):
            calls.append(f"copy {number}")
            yield batch

    for number, batch in enumerate(device_batches(noted(), torch.device("meta"))):
        calls.append(f"compute {number}")
        assert batch.topk_log_probs.device.type == "meta"
        assert batch.topk_log_probs.shape == BATCHES[number].topk_log_probs.shape
    assert calls == [
        "copy 0", "wait", "copy 1", "compute 0", "wait", "copy 2", "compute 1", "wait", "copy 3", "compute 2", "wait",
        "compute 3",
    ]  # fmt: skip
    assert len(used) == len(BATCHES) * sum(isinstance(value, torch.Tensor) for value in vars(BATCHES[0]).values())
    assert not list(device_batches([], torch.device("meta")))
