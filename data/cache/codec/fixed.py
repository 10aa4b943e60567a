"""Nats in two bytes, and floats in four."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.cache.codec.planes import join, split
from data.cache.record import UNUSED

Array = np.ndarray[Any, np.dtype[Any]]
UNIT, OFFSET, NOTHING = 256.0, 16.0, 65535


def fixed_planes(nats: Array) -> list[Array]:
    """(16 − nats) · 256 in two bytes: an error of 1/512 nat, from 16 down to −239.9; −inf is kept."""
    with np.errstate(invalid="ignore"):
        code = np.clip(np.rint((OFFSET - nats.astype(np.float64)) * UNIT), 0, NOTHING - 1)
    return split(np.where(nats > UNUSED, code, NOTHING).astype(np.uint32), 2)


def from_fixed(planes: Sequence[Array]) -> Array:
    """Back to nats, float32."""
    code = join(planes)
    nats = (OFFSET - code.astype(np.float32) / UNIT).astype(np.float32)
    nats[code == NOTHING] = UNUSED
    return nats


def float_planes(values: Array) -> list[Array]:
    """Four planes of float32."""
    return split(np.ascontiguousarray(values, "<f4").view("<u4"), 4)


def from_floats(planes: Sequence[Array]) -> Array:
    """Back to float32."""
    return join(planes).view(np.float32)
