"""Lengths of all records of a cache as three arrays, without a Python object per record."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def _edges(counts: Array) -> Array:
    """Returns the first number of each run of `counts` things, and behind the last run the number of all.  [n + 1]"""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


@dataclass(frozen=True, eq=False)
class CacheLengths:
    """The positions of every record, by blocks and shards, in stored order.

    Shapes: `records` [R] positions of each record, `block_starts` [blocks + 1] first record of each block, and
    `shard_starts` [shards + 1] first block of each shard. The last start is the number of records or blocks.
    """

    records: Array
    block_starts: Array
    shard_starts: Array

    @classmethod
    def from_shards(cls, shards: Iterable[Sequence[Sequence[int]]]) -> Self:
        """Builds the arrays from positions by shard, block and record."""
        blocks_of, records_of, lengths = list[int](), list[int](), list[Array]()
        for shard in shards:
            blocks_of.append(len(shard))
            records_of += [len(block) for block in shard]
            lengths.append(np.fromiter((length for block in shard for length in block), np.int32))
        return cls(
            np.concatenate([np.zeros(0, np.int32), *lengths]),
            _edges(np.array(records_of, np.int64)),
            _edges(np.array(blocks_of, np.int64)),
        )

    @property
    def blocks(self) -> int:
        """Returns the number of blocks."""
        return len(self.block_starts) - 1

    def position_starts(self) -> Array:
        """Returns the positions in front of each block, and behind the last one those of the cache.  [blocks + 1]"""
        # Sum each block's records; `reduceat` would give a block without records the length of a neighbour's first one.
        sums = np.zeros(self.blocks, np.int64)
        filled = np.diff(self.block_starts) > 0
        if filled.any():
            sums[filled] = np.add.reduceat(self.records, self.block_starts[:-1][filled], dtype=np.int64)
        return _edges(sums)

    def block_refs(self, blocks: Array) -> list[tuple[int, int]]:
        """Returns (shard, block of the shard) for blocks that are named by their numbers in the cache."""
        # The shard of a block is the last one that begins at or before it.
        shards = np.searchsorted(self.shard_starts, blocks, side="right") - 1
        return list(zip(shards.tolist(), (blocks - self.shard_starts[shards]).tolist(), strict=True))
