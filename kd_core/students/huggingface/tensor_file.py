"""Safetensors files that are written one tensor at a time, so that memory holds one tensor and not a whole file."""

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_core.errors import UsageError

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNMENT = 8
ENTRY_BYTES = 192  # of a type, a shape and two offsets in the header, beside the name


def write_tensors(path: Path, names: list[str], tensors: Iterable[Tensor]) -> None:
    """Writes tensors under their names, in order, as `safetensors.torch.save_file` stores them.

    The header comes first and has their shapes, so its place is reserved. Spaces behind its JSON fill what is left.

    Raises:
        UsageError: the file cannot be written.
    """
    reserved = sum(len(json.dumps(name)) + ENTRY_BYTES for name in ["", *names]) // ALIGNMENT * ALIGNMENT
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    try:
        with path.open("wb") as file:
            file.seek(8 + reserved)
            for name, tensor in zip(names, tensors, strict=False):
                values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                start, end = end, end + values.nbytes
                shape, dtype = list(tensor.shape), DTYPE_NAMES[tensor.dtype]
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
                file.write(values.data)
                del tensor, values  # before the next one is gathered
            text = json.dumps(header).encode()
            assert len(text) <= reserved, "a header is longer than its place"
            file.seek(0)
            file.write(struct.pack("<Q", reserved) + text.ljust(reserved))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error}). Free some space and run the same command again."
        ) from None
