"""Which tokens: ids of ragged rows, sorted by rank."""

from typing import Any

import numpy as np

from data.cache.codec.coding import Coding
from data.cache.codec.planes import join, split
from data.cache.codec.rank_tables import Tables
from data.cache.codec.ranks import Ragged, gap_planes, ranks_of
from data.cache.record import UNUSED

Array = np.ndarray[Any, np.dtype[Any]]
Planes = list[Array]
NO_RANK = np.iinfo(np.int32).max


class Entries:
    """Entries [T, K] of head or samples: each row by rising rank, the unused ones last."""

    def __init__(self, tokens: Array, ids: Array, logs: Array, tables: Tables) -> None:
        counts = (logs > UNUSED).sum(axis=1)
        K = int(counts.max(initial=0))
        ranks = np.where(logs > UNUSED, tables.to_ranks(tokens, ids), NO_RANK)
        order = np.argsort(ranks, axis=1, kind="stable")[:, :K]
        self.rows = Ragged.of(counts, K)
        self.ranks, self.logs = np.take_along_axis(ranks, order, 1), np.take_along_axis(logs, order, 1)
        repeated = (np.diff(self.ranks, axis=1) == 0) & (self.ranks[:, 1:] < NO_RANK)
        if repeated.any():
            raise ValueError(f"position {int(repeated.any(axis=1).argmax())} has the same id twice")

    def planes(self, order: Array, tables: Tables) -> Planes:
        """How many there are at each position, and their ids."""
        return [
            *split(self.rows.counts, 2),
            *gap_planes(self.ranks[order], self.rows.rows(order), tables.ranks - 1),
        ]


def decode_entries(planes: Planes, tokens: Array, widest: int, coding: Coding) -> tuple[Array, Ragged]:
    """Ids [T, K], and which are used.

    Raises:
        ValueError: the planes do not belong together, or hold what is no id.
    """
    if len(planes) < 2:
        raise ValueError(f"has {len(planes)} planes, too few")
    counts = join(planes[:2]).astype(np.int64)
    if len(counts) != len(tokens) or int(counts.max(initial=0)) != widest:
        raise ValueError(f"has counts of {len(counts)} positions up to {counts.max(initial=0)}; wanted {widest}")
    rows, order = Ragged.of(counts, widest), coding.order_of(tokens)
    ids = np.empty((len(tokens), widest), coding.tables.narrow)
    # In this order neighbours share a list, which then is in the processor's cache.
    ids[order] = coding.tables.to_ids(tokens[order], ranks_of(planes[2:], rows.rows(order), coding.tables.ranks - 1))
    return ids, rows
