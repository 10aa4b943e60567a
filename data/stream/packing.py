"""Packing of records into rows: best fit over the open rows, the longest record first."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from kd_core.errors import UsageError


def too_long(length: int, row_length: int) -> UsageError:
    """Returns the error of a record that is longer than a row."""
    return UsageError(
        f"a record of the cache has {length} positions, a row {row_length} (collate.row_length). "
        "Train with a row length of at least the cache's, or export with a smaller one."
    )


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Returns rows of indices into `lengths`, none over `row_length`, in the order in which they were opened.

    The longest record is placed first, each in the open row that it fills best. Short records then close the gaps.
    The lengths of the rows depend on the lengths alone, not on their order. Indices ascend within a row. Runs in
    O(n log n).

    Raises:
        UsageError: a record is longer than a row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free positions, row), sorted
    # A stable sort by falling length: records of one length keep their order among each other.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > row_length:
            raise too_long(length, row_length)
        # Best fit: take the open row with the fewest free positions that are enough, the oldest of equal ones, or open
        # a new row.
        best = bisect_left(open_rows, (length, -1))
        free, row = open_rows.pop(best) if best < len(open_rows) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        # Sort a row that still has room back in. A full row stays closed.
        rows[row].append(index)
        if free > length:
            insort(open_rows, (free - length, row))
    return [sorted(row) for row in rows]
