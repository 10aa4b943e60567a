"""Division of an export's windows into blocks and shards, before any of them is scored."""

from collections.abc import Sequence
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


def _runs(sizes: Sequence[int], most: int) -> list[range]:
    """Splits neighbours into runs of at least one element whose sizes add up to at most `most`."""
    runs: list[range] = []
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > most:
            runs.append(range(start, index))
            start, total = index, 0
        total += size
    return [*runs, range(start, len(sizes))]


def plan_shards(positions: Sequence[int], block_positions: int, shard_positions: int, first: int) -> list[PlannedShard]:
    """Divides windows of so many `positions` into blocks, and blocks into shards that are numbered from `first` on."""
    blocks = _runs(positions, block_positions)
    sizes = [sum(positions[i] for i in block) for block in blocks]
    return [
        PlannedShard(f"shard-{number:06d}.tar", tuple(blocks[i] for i in shard))
        for number, shard in enumerate(_runs(sizes, shard_positions), first)
    ]
