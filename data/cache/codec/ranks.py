"""Sorted ranks of ragged rows as planes: gaps to the one before, a byte each, in groups of columns.

Gaps of 255 and more are written aside, in order. Columns are grouped because the first of a row, and those at its
thin end, have other statistics. Rows stand in an order that both sides know.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.cache.codec.planes import join, split, width_of

Array = np.ndarray[Any, np.dtype[Any]]
ESCAPE = 255
GROUPS = 4


class Ragged(NamedTuple):
    """Which of [T, K] are used: `counts` [T], and the mask where they differ (None: all are K)."""

    counts: Array
    K: int
    used: Array | None

    @classmethod
    def of(cls, counts: Array, widest: int) -> "Ragged":
        """From the number of entries of each row, which come first in it."""
        same = bool((counts == widest).all())
        return cls(counts, widest, None if same else np.arange(widest) < counts[:, None])

    def rows(self, order: Array) -> "Ragged":
        """The same rows in another order."""
        return Ragged(self.counts[order], self.K, None if self.used is None else self.used[order])

    def groups(self) -> Iterator[slice]:
        """The column groups."""
        edges = [self.K * i // GROUPS for i in range(GROUPS + 1)]
        return (slice(start, end) for start, end in itertools.pairwise(edges) if end > start)

    def flat(self, values: Array, columns: slice = slice(None)) -> Array:
        """The used ones of [T, K], row by row."""
        part = values[:, columns]
        return part[self.used[:, columns]] if self.used is not None else part.reshape(-1)

    def padded(self, flat: Array, columns: slice = slice(None)) -> Array:
        """[T, K] again; 0 where unused.

        Raises:
            ValueError: there are more or fewer values than used places.
        """
        width = len(range(*columns.indices(self.K)))
        if self.used is None:
            return flat.reshape(len(self.counts), width)
        full = np.zeros((len(self.counts), width), flat.dtype)
        full[self.used[:, columns]] = flat
        return full


def gap_planes(ranks: Array, rows: Ragged, largest: int) -> list[Array]:
    """Planes of ranks [T, K], rising along each row where used; none may repeat in a row."""
    gaps = ranks.copy()
    gaps[:, 1:] = np.diff(ranks, axis=1) - 1
    planes: list[Array] = []
    for columns in rows.groups():
        flat = rows.flat(gaps, columns)
        assert flat.size == 0 or int(flat.min()) >= 0, "ranks repeat or fall along a row"
        planes.append(np.minimum(flat, ESCAPE).astype(np.uint8))
        planes += split(flat[flat >= ESCAPE], width_of(largest))
    return planes


def ranks_of(planes: Sequence[Array], rows: Ragged, largest: int) -> Array:
    """Ranks [T, K], 0 where unused.

    Raises:
        ValueError: a rank is beyond `largest`, or escapes and marks do not match.
    """
    width, gaps = width_of(largest), np.empty((len(rows.counts), rows.K), np.int32)
    for index, columns in enumerate(rows.groups()):
        at = index * (width + 1)
        if at + width >= len(planes):
            raise ValueError(f"has {len(planes)} planes of gaps, too few")
        steps, aside = np.add(planes[at], 1, dtype=np.int32), join(planes[at + 1 : at + 1 + width]).astype(np.int32)
        marked = np.flatnonzero(planes[at] == ESCAPE)
        if len(marked) != len(aside):
            raise ValueError(f"{len(marked)} gaps are marked as written aside, {len(aside)} are")
        steps[marked] = aside + 1
        gaps[:, columns] = rows.padded(steps, columns)
    gaps[:, :1] -= 1
    ranks = np.cumsum(gaps, axis=1, out=gaps)
    if rows.used is not None:
        ranks[~rows.used] = 0
    if ranks.size and not 0 <= int(ranks.min()) <= int(ranks.max()) <= largest:
        raise ValueError(f"holds rank {ranks.max()}; the largest is {largest}")
    return ranks
