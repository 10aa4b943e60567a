"""Copies of a run's state in the memory of the host, so that training goes on while they are written."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from kd_core.sharded_values import local_values, with_layout_of
from kd_core.training.checkpoints.checkpoint_state import State

ALIGNMENT = 64
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every GPU


def _host_memory(size: int, device: torch.device) -> Tensor:
    """Allocates bytes on the host, page-locked if a GPU copies into them.

    They are locked where they are. torch's own page-locked memory is rounded up to a power of two.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda":
        cudart: Any = torch.cuda.cudart()
        torch.cuda.check_error(int(cudart.cudaHostRegister(memory.data_ptr(), size, PORTABLE)))
        weakref.finalize(memory, cudart.cudaHostUnregister, memory.data_ptr())
    return memory


class HostBuffers:
    """Memory for one copy of a state, which every copy overwrites. Names that are new get one more piece."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.views: State = {}

    def add(self, tensors: State) -> None:
        """Allocates one piece of memory for all tensors, and a view of it for each."""
        if not tensors:
            return
        starts, end = dict[str, int](), 0
        for name, tensor in tensors.items():
            starts[name], end = end, end + math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        piece = _host_memory(max(end, ALIGNMENT), next(iter(tensors.values())).device)
        self.pieces.append(piece)
        for name, tensor in tensors.items():
            numbers = piece[starts[name] : starts[name] + tensor.nbytes].view(tensor.dtype)
            self.views[name] = numbers.view(tensor.shape)


def copy_to_cpu(state: State, buffers: HostBuffers) -> State:
    """Copies this process's part of a state into the buffers, and returns the copies in the layout of the state."""
    local = {name: local_values(tensor) for name, tensor in state.items()}
    buffers.add({name: tensor for name, tensor in local.items() if name not in buffers.views})
    for name, tensor in local.items():
        buffers.views[name].copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: with_layout_of(tensor, buffers.views[name]) for name, tensor in state.items()}
