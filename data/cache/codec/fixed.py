"""Planes of log-probabilities as fixed point (two bytes) and of floats (four bytes)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.cache.codec.planes import join_planes, split_planes
from data.cache.record import UNUSED

Array = np.ndarray[Any, np.dtype[Any]]
UNIT, OFFSET, NO_MASS = 256.0, 16.0, 65535  # codes a nat, largest log-probability, code of −inf


def encode_fixed(nats: Array) -> list[Array]:
    """Encodes nats as (16 − nats) · 256 in two planes.

    The error is at most 1/512 nat, from 16 down to −239.9. A value of −inf stays −inf.
    """
    # code = clip(round((16 − nats) · 256), 0, 65534); −inf has the last code to itself.  [n] → 2 × [n]
    with np.errstate(invalid="ignore"):
        code = np.clip(np.rint((OFFSET - nats.astype(np.float64)) * UNIT), 0, NO_MASS - 1)
    return split_planes(np.where(nats > UNUSED, code, NO_MASS).astype(np.uint32), 2)


def decode_fixed(planes: Sequence[Array]) -> Array:
    """Decodes two planes of fixed point into nats, float32."""
    # nats = 16 − code / 256.  2 × [n] → [n]
    code = join_planes(planes)
    nats = (OFFSET - code.astype(np.float32) / UNIT).astype(np.float32)
    nats[code == NO_MASS] = UNUSED
    return nats


def encode_floats(values: Array) -> list[Array]:
    """Encodes float32 values in four planes, bit for bit."""
    return split_planes(np.ascontiguousarray(values, "<f4").view("<u4"), 4)


def decode_floats(planes: Sequence[Array]) -> Array:
    """Decodes four planes into float32 values."""
    return join_planes(planes).view(np.float32)
