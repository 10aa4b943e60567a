"""The order of an epoch as a pure function of (seed, epoch, cache, row length): no rank, no worker, no state.

Shards are permuted and taken in groups. The first cache blocks of a group's shards form one window, their second
blocks the next, and so on. Records are permuted within a window and packed into rows (`packing.py`). The emptiest row
is not made: its records are carried into the first rows of the next window. A reader therefore holds the blocks of one
window, briefly of two, and reads each shard once, from its beginning. A cursor is one number: the rows taken so far.
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
    """Records that share one packed row, their positions in all, and the blocks to hold while the row is read.

    `part` is the index of its cache in a mixture.
    """

    records: tuple[RecordRef, ...]
    positions: int
    window: frozenset[BlockRef]
    part: int = 0


def windows(lengths: Lengths, shards: Sequence[int], group: int) -> Iterator[list[BlockRef]]:
    """Yields the blocks of each window: the i-th blocks of `group` shards."""
    for start in range(0, len(shards), group):
        grouped = shards[start : start + group]
        # Transpose the lists of blocks by shard. Shorter shards are missing from the last windows.
        for blocks in zip_longest(*([(shard, i) for i in range(len(lengths[shard]))] for shard in grouped)):
            yield [block for block in blocks if block is not None]


def epoch_rows(lengths: Lengths, row_length: int, seed: int | None, epoch: int, shuffle_shards: int) -> Iterator[Row]:
    """Yields all rows of one epoch. Every record is in exactly one of them.

    Args:
        lengths: positions of each record, by shard and block.
        row_length: positions of a row. No record is longer.
        seed: the run's seed. None keeps the stored order.
        epoch: number of the epoch, from 0.
        shuffle_shards: number of shards in a group.
    """
    random = None if seed is None else np.random.default_rng([seed, epoch])
    shards = list(range(len(lengths))) if random is None else random.permutation(len(lengths)).tolist()
    # A closing None marks the last window, from which no record can be carried on.
    carried: list[RecordRef] = []
    planned = itertools.chain(windows(lengths, shards, 1 if random is None else shuffle_shards), [None])
    for window, after in itertools.pairwise(planned):
        assert window is not None
        # Permute the window's records behind those carried from the window before, which have the lowest indices.
        new_refs = [(shard, block, index) for shard, block in window for index in range(len(lengths[shard][block]))]
        order = range(len(new_refs)) if random is None else random.permutation(len(new_refs)).tolist()
        num_carried, refs = len(carried), [*carried, *(new_refs[i] for i in order)]
        sizes = [lengths[shard][block][index] for shard, block, index in refs]
        rows = [(row, sum(sizes[i] for i in row)) for row in pack_rows(sizes, row_length)]
        # Carry the records of the emptiest row into the next window, unless all rows are full.
        carried = []
        if after is not None and rows:
            emptiest = min(range(len(rows)), key=lambda i: rows[i][1])
            if rows[emptiest][1] < row_length:
                carried = [refs[i] for i in rows.pop(emptiest)[0]]
        # Blocks of carried records stay held, also while they wait for the next window. Rows list their indices in
        # ascending order and come in the order of the first, so those with carried records come first.
        hold = frozenset(window) | {ref[:2] for ref in carried}
        hold_with_older = hold | {ref[:2] for ref in refs[:num_carried]}
        for row, positions in rows:
            yield Row(tuple(refs[i] for i in row), positions, hold_with_older if row[0] < num_carried else hold)


def endless_rows(lengths: Lengths, row_length: int, seed: int, shuffle_shards: int) -> Iterator[Row]:
    """Yields the rows of one epoch after the other, without end."""
    for epoch in itertools.count():
        yield from epoch_rows(lengths, row_length, seed, epoch, shuffle_shards)
