"""The copy of a state in host memory: the same values in one piece of memory, which the next copy overwrites."""

from typing import Any

import pytest
import torch

from kd_core.training.checkpoints import host_buffers
from kd_core.training.checkpoints.host_buffers import HostBuffers, copy_to_cpu


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "step": torch.tensor(float(seed)),
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "empty": torch.empty(0, 4),
        "count": torch.tensor([seed], dtype=torch.int64),
        "strided": torch.randn(4, 6).t(),
        "long": torch.randn(101, dtype=torch.float64),
    }


def test_copies_are_the_values_and_stay_when_the_state_moves_on() -> None:
    buffers, first, wanted = HostBuffers(), state(1), state(1)
    copies = copy_to_cpu(first, buffers)
    for tensor in first.values():
        tensor.zero_()
    for name, copy in copies.items():
        assert copy.dtype == wanted[name].dtype
        assert torch.equal(copy, wanted[name]), name
    places = {name: copy.data_ptr() for name, copy in copies.items()}
    again = copy_to_cpu(state(2), buffers)
    assert {name: copy.data_ptr() for name, copy in again.items()} == places
    assert all(torch.equal(again[name], tensor) for name, tensor in state(2).items())


def test_all_of_a_state_is_one_piece_little_larger_than_it_and_new_names_are_another() -> None:
    buffers, moments = HostBuffers(), {f"moment {i}": torch.full((2**10 + 1,), float(i)) for i in range(9)}
    copy_to_cpu(state(1), buffers)
    (piece,) = buffers.pieces
    size = sum(tensor.nbytes for tensor in state(1).values())
    assert size <= piece.nbytes < size + 64 * len(state(1))
    copies = copy_to_cpu(state(2) | moments, buffers)
    assert len(buffers.pieces) == 2
    assert all(torch.equal(copies[name], tensor) for name, tensor in (state(2) | moments).items())
    assert buffers.pieces[1].nbytes.bit_count() > 1, "not a power of two"


def test_memory_that_a_gpu_copies_into_is_locked_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls alone: this machine has no CUDA to make them."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    class Cudart:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, args)) or 0

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda _: None)
    memory = host_buffers._host_memory(100, torch.device("cuda", 1))
    address = memory.data_ptr()
    assert calls == [("cudaHostRegister", (address, 100, 1))]
    del memory
    assert calls[1:] == [("cudaHostUnregister", (address,))]
