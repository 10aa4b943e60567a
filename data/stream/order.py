"""The order of rows as a pure function of (seed, epoch, cache, row length): no rank, no worker, no state.

    segments of the cache ─ permuted ─► all rows of the epoch in line ─ cut into lanes ─► dealt: row i from lane i mod L

Each epoch permutes the segments of the cache (`segments.py`) and sets their rows in line. Within a segment, windows
keep their stored order. Which record of one length takes which place is drawn, and so is the order of a window's rows.
The line is cut into L = 64 lanes of equal length (one more row in some), which are permuted too. Row i of the epoch is
the next row of lane i mod L. Rank r of n takes rows r, r + n, …: where n divides L, those of L / n lanes, which read
neighbouring blocks one after the other.

As many rows are made of a segment in each epoch, so any row is found by arithmetic. A cursor is one number, the rows
taken so far. Evaluation keeps the stored order: one lane, and nothing is permuted.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.cache.indexes.lengths import Array, CacheLengths
from data.stream.packing import pack_rows
from data.stream.segments import Segments, carry_limits
from kd_core.errors import UsageError

ORDER_VERSION = 2  # of the order of a run's rows: a change of it changes this
LANES = 64
CARRIED_TURNS = 24  # windows for which a record may be carried and still be known ahead
WHOLE_POSITIONS = 1 << 19  # a cache of fewer positions may be held whole
BlockRef = tuple[int, int]  # shard, block of it
RecordRef = tuple[int, int, int]  # shard, block, record of it


class Place(NamedTuple):
    """Place of a row: its epoch, segment, and number in the segment. `part` is the index of its cache in a mixture."""

    epoch: int
    segment: int
    row: int
    part: int = 0


class Row(NamedTuple):
    """Records that share one packed row, their positions in all, and the row's place."""

    records: tuple[RecordRef, ...]
    positions: int
    place: Place


class PackedSegment(NamedTuple):
    """The rows of a segment in one epoch.

    Shapes: `records` [R] all records, row by row, `edges` [rows + 1] where each row begins, and `row_of` [R] the row of
    each record in stored order.
    """

    records: Array
    edges: Array
    row_of: Array


class _Epoch(NamedTuple):
    """One epoch: its segments in order, the rows in front of each and of all [segments + 1], and the lanes' first rows.

    The lanes stand in the order in which they are dealt.
    """

    segments: Array
    edges: Array
    lanes: Array


def deal_lanes(rows: int, lanes: int, random: np.random.Generator | None) -> Array:
    """Returns the first row of each lane, in the order of dealing.  [lanes]"""
    order = np.arange(lanes) if random is None else random.permutation(lanes)
    # The lanes that are dealt first have one row more where rows are left over.
    sizes = np.empty(lanes, np.int64)
    sizes[order] = rows // lanes + (np.arange(lanes) < rows % lanes)
    return (np.cumsum(sizes) - sizes)[order]


def pack_segment(
    lengths: CacheLengths, windows: Array, row_length: int, random: np.random.Generator | None
) -> list[list[int]]:
    """Returns the rows of one segment in their order, as numbers of records in the cache.

    Args:
        lengths: lengths of the cache.
        windows: first record of each window of the segment, and the one behind the last.
        row_length: positions of a row.
        random: draws the places of records. None keeps the stored order.
    """
    most_carried, least_free = carry_limits(row_length)
    rows, carried = list[list[int]](), list[int]()
    for window, (start, end) in enumerate(zip(windows[:-1].tolist(), windows[1:].tolist(), strict=True), 2):
        # Shuffle the records. Packing goes by length, so this decides between records of one length.
        refs = [*carried, *range(start, end)]
        refs = sorted(refs) if random is None else [refs[i] for i in random.permutation(len(refs)).tolist()]
        sizes = lengths.records[refs].tolist()
        packed = pack_rows(sizes, row_length)
        # Carry the emptiest rows, the oldest of equal ones first, unless this window is the segment's last.
        free = [row_length - sum(sizes[i] for i in row) for row in packed]
        open_rows = [i for i in range(len(packed)) if free[i] > least_free]
        emptiest = sorted(open_rows, key=lambda i: -free[i])[:most_carried] if window < len(windows) else []
        carried = [refs[i] for row in emptiest for i in packed[row]]
        skipped = set(emptiest)
        made = [[refs[i] for i in packed[row]] for row in range(len(packed)) if row not in skipped]
        rows += sorted(made) if random is None else [made[i] for i in random.permutation(len(made)).tolist()]
    return rows


class CacheOrder:
    """The rows of all epochs of one cache, each found by its number.

    Args:
        lengths: lengths of the cache.
        segments: the cache's segments at the row length.
        counts: the number of rows of each segment.
        row_length: positions of a row.
        seed: the run's seed. None keeps the stored order.
    """

    def __init__(
        self, lengths: CacheLengths, segments: Segments, counts: Array, row_length: int, seed: int | None
    ) -> None:
        self.lengths, self.segments, self.counts, self.row_length = lengths, segments, counts, row_length
        self.seed, self.rows = seed, int(counts.sum())
        self.lanes = 1 if seed is None else max(1, min(LANES, self.rows))
        self._epoch = lru_cache(maxsize=4)(self._begin_epoch)
        self._segment = lru_cache(maxsize=2 * LANES)(self._pack)

    @property
    def orders(self) -> "list[CacheOrder]":
        """Returns the orders of all caches, as a mixture's."""
        return [self]

    @property
    def shares(self) -> list[tuple[float, int]]:
        """Returns, for each cache of the order, its share of the rows and the rows of its epoch."""
        return [(1.0, self.rows)]

    @property
    def ahead(self) -> int:
        """Returns how many rows to look ahead, to find nearly all rows of a lane that share a block.

        It is at most half of an epoch, where the ends of lanes meet the beginnings of their neighbours. Small caches
        are looked at whole.
        """
        windows = max(1, len(self.segments.window_starts) - 1)
        in_a_lane = 2 * -(-self.rows // windows) + CARRIED_TURNS * carry_limits(self.row_length)[0]
        return min(self.lanes * in_a_lane, max(self.rows // 2, WHOLE_POSITIONS // self.row_length), self.rows)

    def place(self, index: int) -> Place:
        """Returns the place of row `index` of all epochs."""
        number, rest = divmod(index, self.rows)
        epoch, (turn, lane) = self._epoch(number), divmod(rest, self.lanes)
        # Find the row in the line of the epoch, and there its segment.
        line = epoch.lanes[lane] + turn
        position = epoch.edges.searchsorted(line, side="right") - 1
        return Place(number, int(epoch.segments[position]), int(line - epoch.edges[position]))

    def row(self, place: Place) -> Row:
        """Returns the records at a place, each by its shard, its block there, and its index in the block."""
        packed = self._segment(place.epoch, place.segment)
        start, end = packed.edges[place.row : place.row + 2].tolist()
        records = packed.records[start:end]
        blocks = np.searchsorted(self.lengths.block_starts, records, side="right") - 1
        indices = (records - self.lengths.block_starts[blocks]).tolist()
        refs = zip(self.lengths.block_refs(blocks), indices, strict=True)
        positions = int(self.lengths.records[records].sum(dtype=np.int64))
        return Row(tuple((shard, block, index) for (shard, block), index in refs), positions, place)

    def places_of_block(self, ref: BlockRef, near: Place) -> list[Place]:
        """Returns the place of each record of a block, in the epoch and segment of a row that has one of them."""
        # Number the block's records in the cache, then in the segment.
        block = int(self.lengths.shard_starts[ref[0]]) + ref[1]
        start, end = self.lengths.block_starts[block : block + 2].tolist()
        first = int(self.lengths.block_starts[self.segments.window_starts[self.segments.starts[near.segment]]])
        rows = self._segment(near.epoch, near.segment).row_of[start - first : end - first].tolist()
        return [near._replace(row=row) for row in rows]

    def _begin_epoch(self, epoch: int) -> _Epoch:
        random = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        segments = np.arange(len(self.counts)) if random is None else random.permutation(len(self.counts))
        edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts[segments])])
        return _Epoch(segments, edges, deal_lanes(self.rows, self.lanes, random))

    def _pack(self, epoch: int, segment: int) -> PackedSegment:
        random = None if self.seed is None else np.random.default_rng([self.seed, epoch, segment])
        first, last = self.segments.starts[segment : segment + 2].tolist()
        windows = self.lengths.block_starts[self.segments.window_starts[first : last + 1]]
        rows = pack_segment(self.lengths, windows, self.row_length, random)
        if len(rows) != self.counts[segment]:
            raise UsageError(
                f"segment {segment} of a cache has {len(rows)} rows; {self.counts[segment]} were counted. Delete the "
                "folder kd-workspace/rows of your cache folder (~/.cache), where the counts are kept."
            )
        records, sizes = np.array([record for row in rows for record in row], np.int64), [len(row) for row in rows]
        row_of = np.empty(len(records), np.int64)
        row_of[records - windows[0]] = np.repeat(np.arange(len(rows)), sizes)
        return PackedSegment(records, np.cumsum([0, *sizes]), row_of)
