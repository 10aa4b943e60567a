"""Packing of records into rows: best fit over the open rows, the longest record first."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from kd_core.errors import UsageError


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Returns rows of indices into `lengths`, none over `row_length`.

    Indices ascend within a row, and rows are sorted by their first index. The longest record is placed first, each in
    the open row that it fills best. Short records then close the gaps. Runs in O(n log n).

    Raises:
        UsageError: a record is longer than a row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free positions, row), sorted
    # A stable sort by falling length: equal lengths keep their order, so the packing is deterministic.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > row_length:
            raise UsageError(
                f"a record of the cache has {length} positions, a row {row_length} (collate.row_length). "
                "Train with a row length of at least the cache's, or export with a smaller one."
            )
        # Best fit: take the open row with the fewest free positions that are enough, or open a new row.
        best = bisect_left(open_rows, (length, -1))
        free, row = open_rows.pop(best) if best < len(open_rows) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        # Sort a row that still has room back in. A full row stays closed.
        rows[row].append(index)
        if free > length:
            insort(open_rows, (free - length, row))
    return sorted(sorted(row) for row in rows)
