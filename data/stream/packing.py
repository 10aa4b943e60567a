"""Packing: which records share a row. Best fit over the open rows, the longest record first."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from kd_core.errors import UsageError


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of indices into `lengths`, none over `row_length`; rows and what is in them stand in the order given.

    Each record goes to the open row that it fills best, the longest first: short ones then close the gaps. Runs in
    O(n log n).

    Raises:
        UsageError: a record is longer than a row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free positions, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > row_length:
            raise UsageError(
                f"a record of the cache has {length} positions, a row {row_length} (collate.row_length). "
                "Train with a row length of at least the cache's, or export with a smaller one."
            )
        at = bisect_left(open_rows, (length, -1))
        free, row = open_rows.pop(at) if at < len(open_rows) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if free > length:
            insort(open_rows, (free - length, row))
    return sorted(sorted(row) for row in rows)
