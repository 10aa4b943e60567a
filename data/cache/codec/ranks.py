"""Sorted ranks of ragged rows as planes of gaps, one byte each, in groups of columns.

    ranks [N, K], rising along rows → gaps r_j − r_{j−1} − 1 → 4 groups of columns → per group: bytes, large gaps

A gap of 255 or more is 255 in its plane, and is stored in full in the planes of large gaps, in the same order. Columns
are grouped because the first gaps of a row and the last ones have different statistics. Writer and reader sort the
rows alike (`Coding.order_of`), so their order is not stored.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.cache.codec.planes import bytes_for, join_planes, split_planes

Array = np.ndarray[Any, np.dtype[Any]]
ESCAPE = 255
GROUPS = 4
LARGEST_INT = np.iinfo(np.int32).max


class Ragged(NamedTuple):
    """The used places of [N, K], which come first in each row.

    `counts` [N] has their number by row. `used` [N, K] is their mask, or None where all rows are full.
    """

    counts: Array
    K: int
    used: Array | None

    @classmethod
    def from_counts(cls, counts: Array, widest: int) -> "Ragged":
        """Builds the mask from the number of used places of each row."""
        same = bool((counts == widest).all())
        return cls(counts, widest, None if same else np.arange(widest) < counts[:, None])

    def rows(self, order: Array) -> "Ragged":
        """Returns the same rows in another order."""
        return Ragged(self.counts[order], self.K, None if self.used is None else self.used[order])

    def groups(self) -> Iterator[slice]:
        """Yields the columns of each group: ⌊K·i/4⌋ to ⌊K·(i+1)/4⌋, where that is not empty."""
        edges = [self.K * i // GROUPS for i in range(GROUPS + 1)]
        return (slice(start, end) for start, end in itertools.pairwise(edges) if end > start)

    def flat(self, values: Array, columns: slice = slice(None)) -> Array:
        """Returns the used values of `columns`, row by row.  [N, K] → [used]"""
        chunk = values[:, columns]
        return chunk[self.used[:, columns]] if self.used is not None else chunk.reshape(-1)

    def padded(self, flat: Array, columns: slice = slice(None)) -> Array:
        """Returns flat values as rows again, with 0 in unused places.  [used] → [N, width of columns]

        Raises:
            ValueError: there are more or fewer values than used places.
        """
        width = len(range(*columns.indices(self.K)))
        if self.used is None:
            return flat.reshape(len(self.counts), width)
        full, used = np.zeros((len(self.counts), width), flat.dtype), self.used[:, columns]
        if len(flat) != np.count_nonzero(used):  # numpy would broadcast a single value
            raise ValueError(f"has {len(flat)} values for {np.count_nonzero(used)} entries")
        full[used] = flat
        return full


def encode_ranks(ranks: Array, rows: Ragged, largest: int) -> list[Array]:
    """Encodes ranks [N, K] as planes. Used ranks rise along each row, without repeats."""
    # g_0 = r_0 and g_j = r_j − r_{j−1} − 1: ranks do not repeat, so the least gap is 0.  [N, K]
    gaps = ranks.copy()
    gaps[:, 1:] = np.diff(ranks, axis=1) - 1
    planes: list[Array] = []
    for columns in rows.groups():
        flat = rows.flat(gaps, columns)
        assert flat.size == 0 or int(flat.min()) >= 0, "ranks repeat or fall along a row"
        # One byte a gap, with 255 as the mark of a large one, then the large gaps in full.
        planes.append(np.minimum(flat, ESCAPE).astype(np.uint8))
        planes += split_planes(flat[flat >= ESCAPE], bytes_for(largest))
    return planes


def _steps(planes: Sequence[Array], largest: int) -> Array:
    """Decodes a column group into the differences of neighbouring ranks: each gap plus 1.  [used]"""
    steps, large_gaps = np.add(planes[0], 1, dtype=np.int32), join_planes(planes[1:]).astype(np.int32)
    # Put the large gaps in the places that are marked by 255.
    marked = np.flatnonzero(planes[0] == ESCAPE)
    if len(marked) != len(large_gaps):
        raise ValueError(f"{len(marked)} gaps are marked as stored separately, {len(large_gaps)} are")
    if len(large_gaps):
        if not 0 <= int(large_gaps.min()) <= int(large_gaps.max()) <= largest:
            raise ValueError(f"holds a gap beyond rank {largest}")
        steps[marked] = large_gaps + 1
    return steps


def decode_ranks(planes: Sequence[Array], rows: Ragged, largest: int) -> Array:
    """Decodes the planes of `encode_ranks` into ranks [N, K], 0 where unused.

    Raises:
        ValueError: a rank is beyond `largest`, the number of large gaps is not that of their marks, or there are more
            or fewer planes.
    """
    width, gaps = bytes_for(largest), np.empty((len(rows.counts), rows.K), np.int32)
    groups = list(rows.groups())
    if len(planes) != len(groups) * (width + 1):
        raise ValueError(f"has {len(planes)} planes of gaps, wanted {len(groups) * (width + 1)}")
    # A group has a plane of bytes and `width` planes of large gaps.
    for index, columns in enumerate(groups):
        first_plane = index * (width + 1)
        gaps[:, columns] = rows.padded(_steps(planes[first_plane : first_plane + 1 + width], largest), columns)
    # The first rank of a row is its gap itself, without the 1 between neighbours.
    gaps[:, :1] -= 1
    # Where the sum of a row could overflow int32 and wrap back into range, check it in int64 first.
    if rows.K * (largest + 1) > LARGEST_INT and int(gaps.sum(axis=1, dtype=np.int64).max(initial=0)) > LARGEST_INT:
        raise ValueError(f"holds ranks beyond {largest}")
    # r_j = Σ_{i ≤ j} of the differences, in place.  [N, K]
    ranks = np.cumsum(gaps, axis=1, out=gaps)
    if rows.used is not None:
        ranks[~rows.used] = 0
    if ranks.size and not 0 <= int(ranks.min()) <= int(ranks.max()) <= largest:
        raise ValueError(f"holds rank {ranks.max()}; the largest is {largest}")
    return ranks
