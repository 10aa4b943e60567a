"""Optimisers of torchao whose moments have 8 bits (arXiv 2110.02861), and their states as plain tensors.

    optimizer.NAME.exp_avg@codes   one byte for each number of the parameter, in its shape and layout
    optimizer.NAME.exp_avg@scale   the largest absolute value of each block of numbers, [..., last dimension / block]

A block lies within a row of the parameter, so every layout of ranks cuts codes and scales at the same places. No other
module imports torchao.
"""

import importlib
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
        UsageError: one has rows of another length. The message names the largest block that fits.
    """
    for name, parameter in named.items():
        local = local_values(parameter)
        row = local.shape[-1] if local.ndim else 1
        if local.numel() >= LEAST and local.numel() % block == 0 and row % block:
            fitting = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if row % size == 0)
            raise UsageError(
                f"optimizer.settings.block_size: got {block}; rows of {name} have {row} numbers on a rank, and a "
                f"checkpoint needs whole blocks in a row. Set it to {fitting}."
            )


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
        codes, scale = local_values(state.pop(coded)), state.pop(f"{key}{SCALE}", None)
        _, box = local_box(parameter.detach())
        rows = 0 if scale is None or not scale.ndim else scale.shape[-1]
        block = parameter.shape[-1] // rows if rows else 0
        fits = scale is not None and box is not None and scale.shape == (*parameter.shape[:-1], rows)
        if not fits or block * rows != parameter.shape[-1] or box[-1].start % block or codes.shape[-1] % block:
            raise UsageError(
                f"optimizer.{name}.{key}: its 8-bit blocks do not fit the parameter or this layout of ranks. Resume "
                "with the layout that wrote the checkpoint."
            )
        # This rank's rows, and its blocks of each.
        part = local_values(scale)[(*box[:-1], slice(box[-1].start // block, box[-1].stop // block))]
        state[key] = _eight_bits(codes, part.reshape(-1).contiguous(), key == SIGNED, parameter)
    return state


def _eight_bits(codes: Tensor, scale: Tensor, signed: bool, parameter: nn.Parameter) -> Tensor:
    kind = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    # The table of values of all codes is the same for every tensor.  [256]
    table = kind.zeros((1,), signed, 1, codes.device).qmap
    return _placed(kind(codes, scale, table, signed, dtype=parameter.dtype), parameter, 1)
