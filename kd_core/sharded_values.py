"""Reads and writes values of parameters that may be sharded over processes. None of them holds the whole model.

With one process parameters are plain tensors. With more they are DTensors, and a rank holds a box of the whole tensor.
For example, rows are split among tensor-parallel ranks, and each part again among the ranks of FSDP.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # DCP uses the same

from kd_core.errors import RemoteError, UsageError

Box = tuple[slice, ...]


def _is_box(parameter: DTensor) -> bool:
    """Checks that this rank's part of a parameter is one box of the whole tensor.

    A dimension that is sharded twice gives a contiguous run if the mesh splits it from the outside in. FSDP on top of
    tensor parallelism splits it from the inside out, and marks that by a strided shard on the outer mesh dimension,
    which gives a contiguous run again. Other placements are not sliced by `local_box`.
    """
    return all(
        isinstance(placement, Replicate | Shard) or "StridedShard" in str(type(placement))
        for placement in parameter.placements
    )


def local_values(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_value(norm: Tensor) -> float:
    """Returns a number that ranks may hold partial results of, such as the norm of a sharded tensor."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def local_box(parameter: Tensor) -> tuple[Tensor, Box | None]:
    """Returns this process's values of a parameter and their box in the whole tensor, or None if they are no box."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    local = parameter.to_local()
    if not _is_box(parameter):
        return local, None
    # A box has a slice for each dimension: [offset, offset + size).
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert tuple(shape) == tuple(local.shape), f"{parameter.placements}: {shape} and {local.shape}"
    return local, tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


@torch.no_grad()
def fill_sharded(parameter: Tensor, read: Callable[[Box], Tensor]) -> Tensor:
    """Fills a parameter in place and returns the values that this process has read.

    `read` returns the values of a box of the whole tensor.
    """
    # Usual case: read only this process's box.
    local, box = local_box(parameter)
    if box is not None:
        values = read(box)
        local.copy_(values)
        return values
    # No box: read the whole tensor, and cut it as the parameter is placed. Every rank has read the same, so none sends.
    assert isinstance(parameter, DTensor)
    full = read(tuple(slice(0, size) for size in parameter.shape))
    distributed = distribute_tensor(full.to(local), parameter.device_mesh, parameter.placements, src_data_rank=None)
    local.copy_(distributed.to_local())
    return full


@torch.no_grad()
def fill_expert_rows(parameter: Tensor, expert: int, rows: slice, read: Callable[[Box], Tensor]) -> None:
    """Fills rows of one matrix of a parameter [E, rows, in] where this process holds it. `read` is of those rows alone.

    Ranks share such parameters by their first dimension.
    """
    local, box = local_box(parameter)
    assert box is not None
    assert box[1:] == tuple(slice(0, size) for size in parameter.shape[1:]), "experts are divided by expert alone"
    if box[0].start <= expert < box[0].stop:
        values = read((slice(0, rows.stop - rows.start), box[2]))
        local[expert - box[0].start, rows].copy_(values)


@torch.no_grad()
def full_expert_rows(parameter: Tensor, expert: int, part: int, parts: int) -> Tensor:
    """Returns one of so many equal parts of an expert's matrix on every rank. All ranks must call it together."""
    local, box = local_box(parameter)
    assert box is not None
    height = parameter.shape[1] // parts
    rows = slice(part * height, (part + 1) * height)
    is_held = box[0].start <= expert < box[0].stop
    values = local[expert - box[0].start, rows].clone() if is_held else local.new_zeros(height, parameter.shape[2])
    if isinstance(parameter, DTensor):
        # Of the ranks that share the experts, one has these: all others add zeros.
        for dimension, placement in enumerate(parameter.placements):
            if not placement.is_replicate():
                dist.all_reduce(values, group=parameter.device_mesh.get_group(dimension))
    return values


@torch.no_grad()
def full_tensor(parameter: Tensor) -> Tensor:
    """Returns the whole tensor on every rank. All ranks must call it together."""
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach()


def _share_message(message: str | None, parameters: Iterable[Tensor]) -> str | None:
    """Returns one rank's message on all ranks of the parameters' mesh, or just `message` if they are plain tensors."""
    sharded = next((parameter for parameter in parameters if isinstance(parameter, DTensor)), None)
    if sharded is None:
        return message
    # Gather over one mesh dimension after the other: then every rank has seen the messages of all.
    for dimension in range(sharded.device_mesh.ndim):
        group = sharded.device_mesh.get_group(dimension)
        messages: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(messages, message, group=group)
        message = next((text for text in messages if text is not None), None)
    return message


@contextlib.contextmanager
def errors_on_all_ranks(parameters: Iterable[Tensor]) -> Generator[None]:
    """Raises a user's mistake that one rank meets in the block on every rank. Only the first rank reports it.

    Raises:
        UsageError: some rank raised a `UsageError` or `OSError` in the block.
    """
    parameters, error = list(parameters), None
    try:
        yield
    except (UsageError, OSError) as raised:
        error = raised
    # Ranks without an error wait here for the messages of the others.
    message = _share_message(None if error is None else str(error), parameters)
    if message is None:
        return
    if dist.is_initialized() and dist.get_rank() > 0 and any(isinstance(p, DTensor) for p in parameters):
        raise RemoteError(message) from None
    raise error or UsageError(message)


def replicated_empty(shape: torch.Size, dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """Allocates a tensor of its own shape that every rank of the parameter's mesh holds whole."""
    if not shape or not isinstance(parameter, DTensor):
        return torch.empty(shape, dtype=dtype)
    whole = torch.empty(shape, dtype=dtype, device=parameter.device)
    return DTensor.from_local(whole, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim)


def with_layout_of(tensor: Tensor, copy: Tensor) -> Tensor:
    """Returns the copy of a local shard as a DTensor of the same layout, but on the CPU."""
    if not isinstance(tensor, DTensor):
        return copy
    # `DTensor.from_local` would move the copy to the mesh's device.
    spec = tensor._spec  # pyright: ignore[reportPrivateUsage]
    return DTensor(copy, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]


def distinct_local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard, flattened. It is empty if an earlier rank holds a replica of it."""
    if not isinstance(tensor, DTensor):
        return tensor.flatten()
    assert not any(placement.is_partial() for placement in tensor.placements)
    # This rank's coordinates along the mesh dimensions that replicate the tensor: all 0 on the first replica alone.
    replica_coordinates = (
        coordinate
        for coordinate, kind in zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
        if kind.is_replicate()
    )
    local = tensor.to_local().flatten()
    return local[:0] if any(replica_coordinates) else local


def times_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Returns x · mask, where a mask of the global shape is given whole and each rank needs its part of it."""
    if not isinstance(x, DTensor):
        return x * mask
    local, box = local_box(x)
    assert box is not None, x.placements
    return DTensor.from_local(
        local * mask[box], x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )
