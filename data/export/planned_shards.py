"""Division of an export's windows into blocks and shards, before any of them is scored."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data.cache.selection import Selection


class PlannedShard(NamedTuple):
    """A shard to write: the windows of each of its blocks."""

    name: str
    blocks: tuple[range, ...]

    @property
    def windows(self) -> range:
        return range(self.blocks[0].start, self.blocks[-1].stop)


def bytes_per_position(selection: Selection, codec: str) -> float:
    """Returns an estimate of the bytes of a position, by which shards are planned before their content exists."""
    bytes_an_entry = {"standard": 1.5, "compact": 1.4, "lossless": 3.9}[codec]
    return 4 + bytes_an_entry * selection.top_k + 1.5 * selection.draws**0.8


def _runs(sizes: Iterable[int], most: int) -> Iterator[tuple[range, int]]:
    """Splits neighbours into runs of at least one element whose sizes add up to at most `most`, and yields the sums."""
    start, index, total = 0, -1, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > most:
            yield range(start, index), total
            start, total = index, 0
        total += size
    if index >= 0:
        yield range(start, index + 1), total


def plan_shards(
    positions: Iterable[int], block_positions: int, shard_positions: int, first: int
) -> Iterator[PlannedShard]:
    """Divides windows of so many `positions` into blocks, and blocks into shards that are numbered from `first` on.

    A shard is yielded as soon as the window behind it is there.
    """
    blocks, sizes = itertools.tee(_runs(positions, block_positions))
    shards = _runs((size for _, size in sizes), shard_positions)
    for number, (shard, _) in enumerate(shards, first):
        yield PlannedShard(f"shard-{number:06d}.tar", tuple(block for block, _ in itertools.islice(blocks, len(shard))))
