"""Rows whose positions are divided over ranks, for context parallelism: a rank's positions, and their documents.

Attention to all earlier positions costs more the later a position is. So a row is cut into 2 · size equal slices, and
each rank has an early and a late one, the same distance from both ends (arXiv 2407.21783, 3.3.2):

    size 2:    rank 0 | rank 1 | rank 1 | rank 0
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kd_core.document_lengths import Documents


@dataclass(frozen=True)
class RowShare:
    """A rank's positions of a batch's rows.

    Args:
        rank: the rank in its group, whose ranks share the same rows.
        size: the ranks of the group.
        mesh: the group, for collectives. None is enough for cuts.
        rows: rows of the batch.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    rows: int = 1

    def cut(self, whole: Tensor, dim: int = 1) -> Tensor:
        """Returns this rank's positions of whole rows: its early slice, then its late one."""
        if self.size == 1:
            return whole
        slices = whole.chunk(2 * self.size, dim)
        return torch.cat([slices[self.rank], slices[-1 - self.rank]], dim)

    def join(self, shares: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Returns whole rows in the order of their positions, from those that `cut` returned on each rank."""
        early, late = zip(*(share.chunk(2, dim) for share in shares), strict=True)
        return torch.cat([*early, *reversed(late)], dim)


WHOLE_ROWS = RowShare()


@dataclass(frozen=True)
class RowSlice:
    """The slice of the same positions in every row.

    Args:
        documents: those of the slice's queries. Their `keys` also have the positions of a document before the slice.
        key_ranges: for each row the positions of its keys: from the start of its first document to the slice's end.
    """

    documents: Documents
    key_ranges: tuple[tuple[int, int], ...]

    @classmethod
    def from_documents(cls, documents: Documents, rows: int, positions: range) -> Self:
        """Returns the slice of `positions` in rows of whole documents."""
        T = sum(documents.lengths) // rows
        ranges: dict[int, tuple[int, int]] = {}
        query_lengths: list[int] = []
        key_lengths: list[int] = []
        begin = 0
        for length in documents.lengths:
            # The document has positions [first, first + length) of its row. Its keys end with it or with the slice.
            row, first = divmod(begin, T)
            end = min(first + length, positions.stop)
            if end > max(first, positions.start):
                ranges.setdefault(row, (first, positions.stop))
                query_lengths.append(end - max(first, positions.start))
                key_lengths.append(end - first)
            begin += length
        keys = Documents.from_lengths(key_lengths, rows=1)
        queries = Documents.from_lengths(query_lengths, rows)
        return cls(replace(queries, whole_rows=False, keys=keys), tuple(ranges.values()))

    def keys_of(self, whole: Float[Tensor, "B H T d"]) -> Float[Tensor, "1 H L d"]:
        """Returns the positions that the slice attends to, of all rows end to end."""
        rows = [row[:, first:end] for row, (first, end) in zip(whole, self.key_ranges, strict=True)]
        # Of a single row both slices read one tensor, and nothing is copied.
        return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))[None]


@dataclass(frozen=True)
class DividedDocuments:
    """The documents of a rank's share of packed rows, in both of its slices."""

    share: RowShare
    slices: tuple[RowSlice, ...]

    @classmethod
    def from_documents(cls, documents: Documents, share: RowShare) -> Self:
        """Returns a rank's share of whole documents. Their rows divide into 2 · size slices."""
        width = sum(documents.lengths) // share.rows // (2 * share.size)
        starts = share.rank * width, (2 * share.size - 1 - share.rank) * width
        ranges = (range(start, start + width) for start in starts)
        return cls(share, tuple(RowSlice.from_documents(documents, share.rows, positions) for positions in ranges))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Applies a function to every tensor."""
        return replace(self, slices=tuple(replace(s, documents=s.documents.map(function)) for s in self.slices))


PackedDocuments = Documents | DividedDocuments
