"""The order of an epoch as a pure function of (seed, epoch, cache, row length): no rank, no worker, no state.

Shards are permuted and taken in groups; the first blocks of a group's shards are one window, their second blocks the
next, …. Records are permuted within a window and packed into rows (`pack.py`), so a reader holds the blocks of one
window and goes through each shard once, from its beginning. A cursor is therefore one number: rows taken so far.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from data.stream.pack import pack_rows

BlockRef = tuple[int, int]  # shard, block of it
RecordRef = tuple[int, int, int]  # shard, block, record of it
Lengths = Sequence[Sequence[Sequence[int]]]  # positions by shard, block, record


@dataclass(frozen=True)
class Row:
    """Records that share one row, and the window of blocks that they come from."""

    records: tuple[RecordRef, ...]
    window: frozenset[BlockRef]


def windows(lengths: Lengths, shards: Sequence[int], group: int) -> Iterator[list[BlockRef]]:
    """The blocks of each window: the i-th ones of `group` shards."""
    for start in range(0, len(shards), group):
        own = shards[start : start + group]
        for blocks in zip_longest(*([(shard, i) for i in range(len(lengths[shard]))] for shard in own)):
            yield [block for block in blocks if block is not None]


def epoch_rows(lengths: Lengths, row_length: int, seed: int | None, epoch: int, shuffle_shards: int) -> list[Row]:
    """All rows of one epoch; every record stands in exactly one. `seed` None keeps the stored order.

    Args:
        lengths: positions of each record, by shard and block.
        row_length: positions of a row; no record is longer.
        seed: of the run.
        epoch: from 0.
        shuffle_shards: shards of a group.
    """
    random = None if seed is None else np.random.default_rng([seed, epoch])
    shards = list(range(len(lengths))) if random is None else random.permutation(len(lengths)).tolist()
    rows: list[Row] = []
    for window in windows(lengths, shards, 1 if random is None else shuffle_shards):
        refs = [(shard, block, index) for shard, block in window for index in range(len(lengths[shard][block]))]
        order = range(len(refs)) if random is None else random.permutation(len(refs)).tolist()
        refs = [refs[i] for i in order]
        packed = pack_rows([lengths[shard][block][index] for shard, block, index in refs], row_length)
        rows += [Row(tuple(refs[i] for i in row), frozenset(window)) for row in packed]
    return rows
