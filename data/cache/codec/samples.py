"""Importance weights of samples: how often each was drawn, and its weight where the proposal is not the teacher."""

from typing import Any

import numpy as np

from data.cache.codec.entries import Entries
from data.cache.codec.fixed import fixed_planes, from_fixed
from data.cache.codec.planes import join, split, width_of
from data.cache.codec.ranks import Ragged
from data.cache.record import UNUSED
from data.cache.selection import Selection

Array = np.ndarray[Any, np.dtype[Any]]
Planes = list[Array]


def weight_planes(drawn: Entries, tail: Array, selection: Selection) -> Planes:
    """How often each was drawn; where the proposal is not the teacher itself, its weight besides."""
    rows = drawn.rows
    if selection.proposal_temperature != 1:
        return fixed_planes(rows.flat(drawn.logs))
    with np.errstate(invalid="ignore"):
        times = np.rint(np.exp((drawn.logs - tail[:, None]).astype(np.float64)) * selection.draws)
    times = rows.flat(times)
    if times.size and not 1 <= times.min() <= times.max() <= selection.draws:
        raise ValueError(f"a sample's weight is none of 1 to {selection.draws} draws of the tail's mass")
    return split(times.astype(np.uint32), width_of(selection.draws))


def plane_count(selection: Selection) -> int:
    """How many planes `weight_planes` makes."""
    return 2 if selection.proposal_temperature != 1 else width_of(selection.draws)


def decode_weights(planes: Planes, rows: Ragged, tail: Array, selection: Selection) -> Array:
    """Log importance weights [T, S].

    Raises:
        ValueError: a multiplicity that is none, or another number of them than of samples.
    """
    if selection.proposal_temperature != 1:
        logs = rows.padded(from_fixed(planes))
    else:
        times = join(planes)
        if times.size and not 1 <= int(times.min()) <= int(times.max()) <= selection.draws:
            raise ValueError(f"a sample was drawn {times.max()} times of {selection.draws}")
        with np.errstate(divide="ignore"):
            shares = np.log(np.arange(selection.draws + 1) / selection.draws).astype(np.float32)
        logs = rows.padded(shares.take(times)) + tail[:, None]
    if rows.used is not None:
        logs[~rows.used] = UNUSED
    return logs
