"""Division of a cache into segments and windows, and the number of rows of each segment.

    blocks of the cache, in stored order
    ├─ segment ───────────────────┤├─ segment ───────────────────┤      neighbouring blocks, permuted as one
    ├─ window ─┤├─ window ─┤├─ … ─┤                                     blocks whose records are packed together

The records of a window are packed into rows (`packing.py`). The emptiest rows are not made: their records are packed
again with those of the next window. The last window of a segment makes all of its rows, so segments are independent.

The lengths of the records of each row follow from the cache and the row length alone. Which of the records of one
length stands where is drawn anew in each epoch (`order.py`). A segment therefore has as many rows in every epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.cache.indexes.lengths import Array, CacheLengths
from data.stream.packing import too_long

SEGMENT_ROWS, WINDOW_ROWS = 256, 1  # at least so many rows' positions, and at least a block
CARRIED_POSITIONS, LEAST_CARRIED, MOST_CARRIED = 8192, 4, 8
FULL_ENOUGH = 50  # a row with less than one in so many positions free is made, not carried
CHUNK_SEGMENTS = 512  # segments that are counted side by side


def carry_limits(row_length: int) -> tuple[int, int]:
    """Returns how many rows are carried at most, and the free positions above which a row may be carried."""
    return min(MOST_CARRIED, max(LEAST_CARRIED, CARRIED_POSITIONS // row_length)), row_length // FULL_ENOUGH


def _numbers(starts: Array, totals: Array, size: int) -> Array:
    """Returns the number of the run of at least about `size` positions that each block belongs to.

    `starts` are positions in front of a block, within `totals` positions that are divided. The last run also takes
    what would be too small for a run of its own.
    """
    return np.minimum(starts // size, np.maximum(totals // size - 1, 0))


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments and windows of a cache at one row length.

    Shapes: `window_starts` [windows + 1] first block of each window, `starts` [segments + 1] first window of each
    segment.
    """

    window_starts: Array
    starts: Array

    @classmethod
    def from_lengths(cls, lengths: CacheLengths, row_length: int) -> "Segments":
        """Divides a cache by the positions of its blocks."""
        before = lengths.position_starts()
        # Number the segment of each block by the positions in front of it in the cache.  [blocks]
        segments = _numbers(before[:-1], before[-1:], SEGMENT_ROWS * row_length)
        segment_starts = np.flatnonzero(np.diff(segments, prepend=-1))
        edges = np.append(segment_starts, lengths.blocks)
        # Number the window of each block by the positions in front of it in its segment.  [blocks]
        first = before[np.repeat(segment_starts, np.diff(edges))]
        totals = np.repeat(np.diff(before[edges]), np.diff(edges))
        windows = _numbers(before[:-1] - first, totals, WINDOW_ROWS * row_length)
        # A window begins with each segment and where the number of the window changes.
        begins = np.diff(windows, prepend=-1) != 0
        begins[segment_starts] = True
        window_starts = np.flatnonzero(begins)
        return cls(np.append(window_starts, lengths.blocks), np.searchsorted(window_starts, edges))

    def __len__(self) -> int:
        return len(self.starts) - 1


def _padded(values: Array, starts: Array, ends: Array) -> Array:
    """Returns values[start : end] for each start and end, padded with zeros.  [S, most values]"""
    index = starts[:, None] + np.arange(int((ends - starts).max(initial=0)))
    return np.where(index < ends[:, None], values.take(index, mode="clip"), 0).astype(np.int32)


def _falling(lengths: Array) -> Array:
    """Returns the lengths of each window by falling length, without columns that are zero everywhere."""
    ordered = -np.sort(-lengths, axis=1)
    return ordered[:, : int((ordered > 0).sum(axis=1).max(initial=0))]


def _pack_side_by_side(lengths: Array, row_length: int) -> tuple[Array, Array]:
    """Packs the records of many windows as `pack_rows` does, a record of each at a time.

    Takes the falling lengths of S windows, 0 for none [S, n]. Returns the free positions of their rows, `row_length`
    for rows that are not opened [S, R], and the row of each record [S, n].
    """
    rows = np.zeros(lengths.shape, np.int64)
    free = np.full((len(lengths), int(lengths.sum(axis=1).max(initial=0)) // row_length + 2), row_length, np.int32)
    windows = np.arange(len(lengths))
    for column in range(lengths.shape[1]):
        if free[:, -1].min() < row_length:  # always leave a row to open
            free = np.pad(free, ((0, 0), (0, 4)), constant_values=row_length)
        # Best fit: the fewest free positions that are enough. A row that is not opened has most, so it comes last.
        length = lengths[:, column]
        best = np.where(free >= length[:, None], free, row_length + 1).argmin(axis=1)
        free[windows, best] -= length
        rows[:, column] = best
    return free, rows


def _count_chunk(records: Array, edges: Array, windows: Array, row_length: int) -> Array:
    """Returns the rows of S segments.

    `edges` are the first records of all windows of the cache, and `windows` [S, 2] the first window of each segment and
    the one behind its last.
    """
    counts, carried = np.zeros(len(windows), np.int64), np.zeros((len(windows), 0), np.int32)
    active, (most_carried, least_free) = np.arange(len(windows)), carry_limits(row_length)
    for step in range(int((windows[:, 1] - windows[:, 0]).max(initial=0))):
        # Go on with the segments that have another window.
        going = windows[active, 0] + step < windows[active, 1]
        active, carried = active[going], carried[going]
        window = windows[active, 0] + step
        lengths = _padded(records, edges[window], edges[window + 1])
        # A record as long as a row is a row of its own, so only the others need packing.
        full = lengths == row_length
        counts[active] += full.sum(axis=1)
        lengths = _falling(np.concatenate([carried, np.where(full, 0, lengths)], axis=1))
        free, rows = _pack_side_by_side(lengths, row_length)
        # Carry the emptiest rows, the oldest of equal ones first, unless this window is the segment's last.  [S, R]
        is_open = free < row_length
        openness = np.where(is_open & (free > least_free), free, 0)
        order = np.argsort(-openness, axis=1, kind="stable")[:, :most_carried]
        carries = np.zeros_like(is_open)
        np.put_along_axis(carries, order, np.take_along_axis(openness, order, 1) > 0, 1)
        carries &= (window + 1 < windows[active, 1])[:, None]
        counts[active] += (is_open & ~carries).sum(axis=1)
        carried = _falling(np.where(np.take_along_axis(carries, rows, 1), lengths, 0))
    return counts


def count_side_by_side(lengths: CacheLengths, segments: Segments, row_length: int) -> Iterator[Array]:
    """Yields the number of rows of each segment, `CHUNK_SEGMENTS` at a time.

    Raises:
        UsageError: a record is longer than a row.
    """
    if (longest := int(lengths.records.max(initial=0))) > row_length:
        raise too_long(longest, row_length)
    edges = lengths.block_starts[segments.window_starts]
    windows = np.stack([segments.starts[:-1], segments.starts[1:]], axis=1)
    for start in range(0, len(segments), CHUNK_SEGMENTS):
        yield _count_chunk(lengths.records, edges, windows[start : start + CHUNK_SEGMENTS], row_length)
