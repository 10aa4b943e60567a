"""Values into parameters that may be spread over processes: each takes its own part, and none the whole model.

With one process parameters are plain tensors. With more they are DTensors, and what a rank holds of one is a box of
the whole tensor: rows split among tensor-parallel ranks, their parts again among those of FSDP, and so on.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # the one that DCP itself reads by

from kd_core.errors import EchoedError, UsageError

Box = tuple[slice, ...]


def _is_box(parameter: DTensor) -> bool:
    """Shards of shards of one dimension are runs of it only where the mesh splits it from the outside in.

    FSDP on tensor parallelism splits it from the inside out, and says so by a strided shard on the outer dimension:
    a run again. Anything else is not sliced here.
    """
    return all(
        isinstance(each, Replicate | Shard) or "StridedShard" in str(type(each)) for each in parameter.placements
    )


def own_box(parameter: Tensor) -> tuple[Tensor, Box | None]:
    """This process's values of a parameter, and which part of the whole tensor they are; None: no box of it."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    local = parameter.to_local()
    if not _is_box(parameter):
        return local, None
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert tuple(shape) == tuple(local.shape), f"{parameter.placements}: {shape} and {local.shape}"
    return local, tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


@torch.no_grad()
def put(parameter: Tensor, read: Callable[[Box], Tensor]) -> Tensor:
    """Fill a parameter in place; `read` gives a box of the whole tensor. Returns what this process has read."""
    local, box = own_box(parameter)
    if box is not None:
        values = read(box)
        local.copy_(values)
        return values
    assert isinstance(parameter, DTensor)
    whole = read(tuple(slice(0, size) for size in parameter.shape))
    placed = distribute_tensor(whole.to(local), parameter.device_mesh, parameter.placements, src_data_rank=None)
    local.copy_(placed.to_local())
    return whole


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """The whole tensor, on every rank; every rank must call it."""
    found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return found.detach()


def _first_message(message: str | None, parameters: Iterable[Tensor]) -> str | None:
    """Any rank's message, known to all of them; there is nobody to ask where parameters are plain tensors."""
    spread = next((each for each in parameters if isinstance(each, DTensor)), None)
    if spread is None:
        return message
    for dimension in range(spread.device_mesh.ndim):
        group = spread.device_mesh.get_group(dimension)
        messages: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(messages, message, group=group)
        message = next((each for each in messages if each is not None), None)
    return message


@contextlib.contextmanager
def stopping_together(parameters: Iterable[Tensor]) -> Generator[None]:
    """A user's mistake that one rank meets inside stops every rank; the first says it."""
    parameters, error = list(parameters), None
    try:
        yield
    except (UsageError, OSError) as found:
        error = found
    message = _first_message(None if error is None else str(error), parameters)
    if message is None:
        return
    if dist.is_initialized() and dist.get_rank() > 0 and any(isinstance(each, DTensor) for each in parameters):
        raise EchoedError(message) from None
    raise error or UsageError(message)
