"""Importance weights of samples as planes.

Where the proposal is the teacher's own distribution, the number of times m that a sample was drawn fixes its weight:
w = m / S · tail mass, for S draws. With another proposal temperature the log weight is stored as fixed point.
"""

from typing import Any

import numpy as np

from data.cache.codec.entries import RankedEntries
from data.cache.codec.fixed import decode_fixed, encode_fixed
from data.cache.codec.planes import bytes_for, join_planes, split_planes
from data.cache.codec.ranks import Ragged
from data.cache.record import UNUSED
from data.cache.selection import Selection

Array = np.ndarray[Any, np.dtype[Any]]
Planes = list[Array]


def encode_weights(drawn: RankedEntries, tail: Array, selection: Selection) -> Planes:
    """Returns planes of how often each sample was drawn, or of log weights if the proposal is not the teacher.

    Raises:
        ValueError: a weight is not that of 1 to S draws.
    """
    rows = drawn.rows
    if selection.proposal_temperature != 1:
        return encode_fixed(rows.flat(drawn.logs))
    # m = w / tail mass · S, rounded to whole draws; unused places are dropped.  [N, S] → [Σ counts]
    with np.errstate(invalid="ignore"):
        times = np.rint(np.exp((drawn.logs - tail[:, None]).astype(np.float64)) * selection.draws)
    times = rows.flat(times)
    if times.size and not 1 <= times.min() <= times.max() <= selection.draws:
        raise ValueError(f"a sample's weight is not 1 to {selection.draws} draws of the tail's mass")
    return split_planes(times.astype(np.uint32), bytes_for(selection.draws))


def weight_plane_count(selection: Selection) -> int:
    """Returns the number of planes that `encode_weights` makes."""
    return 2 if selection.proposal_temperature != 1 else bytes_for(selection.draws)


def decode_weights(planes: Planes, rows: Ragged, tail: Array, selection: Selection) -> Array:
    """Decodes the planes of `encode_weights` into log importance weights [N, S].

    Raises:
        ValueError: a sample was drawn less than once or more than S times, or the planes have another number of
            samples.
    """
    if selection.proposal_temperature != 1:
        logs = rows.padded(decode_fixed(planes))
    else:
        times = join_planes(planes)
        if times.size and not 1 <= int(times.min()) <= int(times.max()) <= selection.draws:
            raise ValueError(f"a sample was drawn {times.max()} times of {selection.draws}")
        # log w = log(m / S) + log tail mass. Look log(m / S) up for m = 0 … S, with −inf at 0.  [S + 1]
        with np.errstate(divide="ignore"):
            shares = np.log(np.arange(selection.draws + 1) / selection.draws).astype(np.float32)
        logs = rows.padded(shares.take(times)) + tail[:, None]
    # Unused places hold no sample, so their log weight is −inf.
    if rows.used is not None:
        logs[~rows.used] = UNUSED
    return logs
