"""The order of an epoch as a pure function of (seed, epoch, cache, row length): no rank, no worker, no state.

Shards are permuted and taken in groups; the first blocks of a group's shards are one window, their second blocks the
next, …. Records are permuted within a window and packed into rows (`pack.py`); the emptiest row is not made, its
records go to the next window, whose first rows they are in. So a reader holds the blocks of one window, for a moment
of two, and goes through each shard once, from its beginning. A cursor is therefore one number: rows taken so far.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from data.stream.packing import pack_rows

BlockRef = tuple[int, int]  # shard, block of it
RecordRef = tuple[int, int, int]  # shard, block, record of it
Lengths = Sequence[Sequence[Sequence[int]]]  # positions by shard, block, record


@dataclass(frozen=True)
class Row:
    """Records that share one row, its positions, and the blocks to hold while it is read.

    `part` is the cache of a mixture that it comes from.
    """

    records: tuple[RecordRef, ...]
    positions: int
    window: frozenset[BlockRef]
    part: int = 0


def windows(lengths: Lengths, shards: Sequence[int], group: int) -> Iterator[list[BlockRef]]:
    """The blocks of each window: the i-th ones of `group` shards."""
    for start in range(0, len(shards), group):
        own = shards[start : start + group]
        for blocks in zip_longest(*([(shard, i) for i in range(len(lengths[shard]))] for shard in own)):
            yield [block for block in blocks if block is not None]


def epoch_rows(lengths: Lengths, row_length: int, seed: int | None, epoch: int, shuffle_shards: int) -> Iterator[Row]:
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
    carried: list[RecordRef] = []
    planned = itertools.chain(windows(lengths, shards, 1 if random is None else shuffle_shards), [None])
    for window, after in itertools.pairwise(planned):
        assert window is not None
        own = [(shard, block, index) for shard, block in window for index in range(len(lengths[shard][block]))]
        order = range(len(own)) if random is None else random.permutation(len(own)).tolist()
        older, refs = len(carried), [*carried, *(own[i] for i in order)]
        sizes = [lengths[shard][block][index] for shard, block, index in refs]
        rows = [(row, sum(sizes[i] for i in row)) for row in pack_rows(sizes, row_length)]
        carried = []
        if after is not None and rows:
            emptiest = min(range(len(rows)), key=lambda i: rows[i][1])
            if rows[emptiest][1] < row_length:
                carried = [refs[i] for i in rows.pop(emptiest)[0]]
        hold = frozenset(window) | {ref[:2] for ref in carried}
        hold_older = hold | {ref[:2] for ref in refs[:older]}
        for row, positions in rows:
            yield Row(tuple(refs[i] for i in row), positions, hold_older if row[0] < older else hold)


def endless_rows(lengths: Lengths, row_length: int, seed: int, shuffle_shards: int) -> Iterator[Row]:
    """One epoch after the other."""
    for epoch in itertools.count():
        yield from epoch_rows(lengths, row_length, seed, epoch, shuffle_shards)
