"""Optimisers of torchao whose moments have 8 bits (arXiv 2110.02861), and their states as plain tensors.

    optimizer.NAME.exp_avg@codes   one byte for each number of the parameter, in its shape and layout
    optimizer.NAME.exp_avg@scale   the largest absolute value of each block of numbers, [..., last dimension / block]

A block lies within a row of the parameter, so every layout of ranks cuts codes and scales at the same places. No other
module imports torchao.
"""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kd_core.errors import UsageError
from kd_core.sharded_values import local_box, local_values

NAMES = ("Adam8bit", "AdamW8bit")
CODES, SCALE = "@codes", "@scale"
LEAST = 4096  # numbers of a rank's part of a parameter. torchao keeps moments of smaller ones in float32.
SIGNED = "exp_avg"  # the other moments are squares


def optimizer_class(name: str) -> Any:
    """Returns the class of torchao.

    Raises:
        UsageError: torchao is not installed.
    """
    try:
        return getattr(importlib.import_module("torchao.optim"), name)
    except ImportError as error:
        raise UsageError(
            f"optimizer.cls: {name} needs torchao, which cannot be imported ({error}). Install the extra torchao."
        ) from error


def check_blocks(named: Mapping[str, Tensor], block: int) -> None:
    """Checks that blocks of `block` numbers lie within rows of the parameters whose moments have 8 bits.

    Raises:
        UsageError: one has rows of another length, where the message names the largest block that fits, or moments of 8
            bits on some ranks alone.
    """
    for name, parameter in named.items():
        # By shapes that all ranks compute, because where one raises, all must.
        shapes = _shapes_on_ranks(parameter)
        least, most = map(math.prod, shapes)
        if least < LEAST <= most:
            raise UsageError(
                f"optimizer.cls: {name} has {least} to {most} numbers on a rank, and torchao rounds moments of {LEAST} "
                "or more. Take another number of ranks, or leave it to optimizer.others."
            )
        rows = [shape[-1] if shape else 1 for shape in shapes]
        crosses = any(math.prod(shape) % block == 0 and row % block for shape, row in zip(shapes, rows, strict=True))
        if most >= LEAST and crosses:
            fitting = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if math.gcd(*rows) % size == 0)
            raise UsageError(
                f"optimizer.settings.block_size: got {block}; rows of {name} have {rows[1]} numbers on a rank, and a "
                f"checkpoint needs whole blocks in a row. Set it to {fitting}."
            )


def _shapes_on_ranks(parameter: Tensor) -> tuple[list[int], list[int]]:
    """Returns the shapes of a parameter on the rank that has the least of it, and on the one that has the most."""
    least, most = list(parameter.shape), list(parameter.shape)
    for dimension, placement in enumerate(parameter.placements if isinstance(parameter, DTensor) else ()):
        if not placement.is_replicate():
            ranks, divided = parameter.device_mesh.size(dimension), placement.dim  # pyright: ignore[reportAttributeAccessIssue]
            # Each rank has ⌈rows / ranks⌉, and the last what is left.
            least[divided] = max(0, least[divided] - (ranks - 1) * -(-least[divided] // ranks))
            most[divided] = -(-most[divided] // ranks)
    return least, most


def plain_tensors(key: str, value: object, parameter: Tensor) -> dict[str, object]:
    """Returns a value of an optimiser's state by its names in a checkpoint: codes and scales, or the value itself."""
    local: Any = local_values(value) if isinstance(value, Tensor) else value
    if type(local).__name__ != "OptimState8bit":
        return {key: value}
    # [..., D] codes, and [..., D / block] scales, which torchao keeps flat.
    codes, block = local.codes, local.block_size
    if codes.shape[-1] % block:
        return {key: local}
    scale = local.scale.view(*codes.shape[:-1], codes.shape[-1] // block)
    return {f"{key}{CODES}": _placed(codes, parameter, 1), f"{key}{SCALE}": _placed(scale, parameter, block)}


def is_plain(value: Tensor) -> bool:
    """Checks that a tensor is numbers, on one rank or several, and no type of its own with numbers inside."""
    return not is_traceable_wrapper_subclass(local_values(value))


def _placed(local: Tensor, parameter: Tensor, block: int) -> Tensor:
    """Returns a rank's part as a tensor with the layout of its parameter, whose last dimension is in blocks."""
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] // block))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def joined_states(tensors: Mapping[str, Tensor], parameter: nn.Parameter, name: str) -> dict[str, Tensor]:
    """Returns an optimiser's state from the tensors of a checkpoint.

    Raises:
        UsageError: codes and scales do not belong together, or blocks do not fit the parts of the ranks.
    """
    state = dict(tensors)
    for coded in [key for key in state if key.endswith(CODES)]:
        key = coded.removesuffix(CODES)
        codes, scale, block = local_values(state.pop(coded)), state.pop(f"{key}{SCALE}", None), 0
        local, box = local_box(parameter.detach())
        is_coded = codes.dtype == torch.uint8 and codes.shape == local.shape and codes.numel() > 0
        if is_coded and scale is not None and scale.shape[:-1] == parameter.shape[:-1] and scale.numel():
            block = parameter.shape[-1] // scale.shape[-1]
        if scale is None or box is None or not _fits(block, parameter.shape[-1], scale.shape[-1:], box[-1]):
            raise UsageError(
                f"optimizer.{name}.{key}: its 8-bit blocks do not fit the parameter or this layout of ranks. Resume "
                "with the layout that wrote the checkpoint."
            )
        # This rank's rows, and its blocks of each.
        part = local_values(scale)[(*box[:-1], slice(box[-1].start // block, box[-1].stop // block))]
        state[key] = _eight_bits(codes, part.reshape(-1).contiguous(), key == SIGNED, parameter)
    return state


def _fits(block: int, row: int, blocks: torch.Size, part: slice) -> bool:
    """Checks that a row of the parameter has whole blocks, and that a rank's part of it begins and ends with one."""
    return block > 0 and blocks == (row // block,) and not (row % block or part.start % block or part.stop % block)


def _eight_bits(codes: Tensor, scale: Tensor, signed: bool, parameter: nn.Parameter) -> Tensor:
    kind = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    # The table of values of all codes is the same for every tensor.  [256]
    table = kind.zeros((1,), signed, 1, codes.device).qmap
    return _placed(kind(codes, scale, table, signed, dtype=parameter.dtype), parameter, 1)
