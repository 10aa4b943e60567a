"""Token ids of top-K entries and samples as planes: each position's ids as ranks, sorted, of varying number."""

from typing import Any

import numpy as np

from data.cache.codec.coding import Coding
from data.cache.codec.planes import join_planes, split_planes
from data.cache.codec.rank_tables import RankTables
from data.cache.codec.ranks import Ragged, decode_ranks, encode_ranks
from data.cache.record import UNUSED

Array = np.ndarray[Any, np.dtype[Any]]
Planes = list[Array]
NO_RANK = np.iinfo(np.int32).max


class RankedEntries:
    """Top-K entries or samples of N positions, each row by rising rank and the unused ones last.

    `ranks` and `logs` are [N, K], where K is the most that a position uses. `rows` says which are used.

    Raises:
        ValueError: a position has the same id twice.
    """

    def __init__(self, tokens: Array, ids: Array, logs: Array, tables: RankTables) -> None:
        # Cut the rows to the widest one: K = max of the counts.  [N]
        counts = (logs > UNUSED).sum(axis=1)
        K = int(counts.max(initial=0))
        # Sort each row by rank. Unused entries take the largest number, so they come last.  [N, K]
        ranks = np.where(logs > UNUSED, tables.to_ranks(tokens, ids), NO_RANK)
        order = np.argsort(ranks, axis=1, kind="stable")[:, :K]
        self.rows = Ragged.from_counts(counts, K)
        self.ranks, self.logs = np.take_along_axis(ranks, order, 1), np.take_along_axis(logs, order, 1)
        # Equal neighbours among used ranks are equal ids.  [N, K − 1]
        repeated = (np.diff(self.ranks, axis=1) == 0) & (self.ranks[:, 1:] < NO_RANK)
        if repeated.any():
            raise ValueError(f"position {int(repeated.any(axis=1).argmax())} has the same id twice")

    def planes(self, order: Array, tables: RankTables) -> Planes:
        """Returns the planes of the number of entries at each position, and of their ids.

        Counts are in the order of positions, ids in `order`.
        """
        return [
            *split_planes(self.rows.counts, 2),
            *encode_ranks(self.ranks[order], self.rows.rows(order), tables.ranks - 1),
        ]


def decode_entries(planes: Planes, tokens: Array, widest: int, coding: Coding) -> tuple[Array, Ragged]:
    """Returns ids [N, K] and which are used, where K is `widest`.

    Raises:
        ValueError: the planes do not belong together, or hold a rank that no id has.
    """
    if len(planes) < 2:
        raise ValueError(f"has {len(planes)} planes, too few")
    # The first two planes are the number of entries of each position.  [N]
    counts = join_planes(planes[:2]).astype(np.int64)
    if len(counts) != len(tokens) or int(counts.max(initial=0)) != widest:
        raise ValueError(f"has counts of {len(counts)} positions up to {counts.max(initial=0)}; wanted {widest}")
    rows, order = Ragged.from_counts(counts, widest), coding.order_of(tokens)
    ids = np.empty((len(tokens), widest), coding.tables.narrow)
    # Ranks to ids, put back into the order of positions. In the stored order neighbours share a candidate list, so the
    # list stays in the processor's cache.  [N, K]
    ids[order] = coding.tables.to_ids(
        tokens[order], decode_ranks(planes[2:], rows.rows(order), coding.tables.ranks - 1)
    )
    return ids, rows
