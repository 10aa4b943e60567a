"""The order of an epoch as a pure function of (seed, epoch, cache, row length): no rank, no worker, no state.

Shards are permuted; records are permuted within windows of a few shards, so that a reader holds only those;
each window's records are then packed into rows (`pack.py`). A cursor is therefore one number: rows taken so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.stream.pack import pack_rows

RecordRef = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """Records that share one row, and the window of shards that they come from."""

    records: tuple[RecordRef, ...]
    window: frozenset[int]


def _windows(shards: Sequence[int], size: int) -> list[list[int]]:
    return [list(shards[start : start + size]) for start in range(0, len(shards), size)]


def epoch_rows(
    lengths: Sequence[Sequence[int]], row_length: int, seed: int | None, epoch: int, shuffle_shards: int
) -> list[Row]:
    """All rows of one epoch; every record stands in exactly one. `seed` None keeps the stored order.

    Args:
        lengths: positions of each record, by shard.
        row_length: positions of a row; no record is longer.
        seed: of the run.
        epoch: from 0.
        shuffle_shards: shards of a window.
    """
    random = None if seed is None else np.random.default_rng([seed, epoch])
    shards = list(range(len(lengths))) if random is None else random.permutation(len(lengths)).tolist()
    rows: list[Row] = []
    for window in _windows(shards, shuffle_shards):
        refs = [(shard, index) for shard in window for index in range(len(lengths[shard]))]
        order = range(len(refs)) if random is None else random.permutation(len(refs)).tolist()
        refs = [refs[i] for i in order]
        packed = pack_rows([lengths[shard][index] for shard, index in refs], row_length)
        rows += [Row(tuple(refs[i] for i in row), frozenset(window)) for row in packed]
    return rows
