"""Streams of batches from caches, composed of these steps:

    rows of a rank, by their numbers ─► look ahead: what to keep and to read ─► readers: records ─► collate: batches
    └──────────────────────────────────────── by a thread ahead of their use ───────────────────────────────────────┘

The order does not depend on ranks. A step is `rows_per_step` rows of it, and rank r of n takes rows r, r+n, …. Ranks
are data-parallel ranks: all ranks of a tensor-parallel group pass the same rank and size, and get the same batch.
Ranks that divide rows by position do so too, and each gets its share of the batch.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from data.stream.collate import Collate
from data.stream.order import Place, Row
from data.stream.prefetch import prefetch
from data.stream.readers import Readers
from data.stream.source import RowOrder, Shards, Source
from kd_core.row_shares import WHOLE_ROWS, RowShare
from kd_core.types import Batch

NEAR_ROWS, MOST_NEAR_ROWS = 64, 4096  # of a rank, whose blocks are known before they are needed


class RankShare(NamedTuple):
    """A rank's share of a step: its rows, whether they are its own, and the most rows that any rank has.

    A rank without rows of its own has one that another rank reads too.
    """

    places: list[Place]
    is_scored: bool
    most_rows: int


def _batch(readers: Readers, collate: Collate, row_share: RowShare, rows: list[Row]) -> Batch:
    results = [readers.read(row) for row in rows]
    batch = collate([records for records, _ in results])
    return replace(batch, damaged_blocks=sum(damaged for _, damaged in results)).divided(row_share)


def _micro_batches(
    make_batch: Callable[[list[Row]], Batch], share: RankShare, rows: list[Row], micro_batch: int
) -> Generator[Batch]:
    """Yields a rank's micro-batches of a step: equally many on every rank, because all ranks join in each pass.

    An unscored copy of the batch before stands in place of a missing one.
    """
    batch = None
    for start in range(0, share.most_rows, micro_batch):
        batch_rows = rows[start : start + micro_batch]
        batch = make_batch(batch_rows) if batch is None or batch_rows else batch.unscored()
        yield batch if share.is_scored else batch.unscored()


def share_of_step(order: RowOrder, numbers: range, rank: int, ranks: int) -> RankShare:
    """Returns the share of one rank in the rows of a step, which are given by their numbers."""
    rank_rows = numbers[rank::ranks]
    return RankShare([order.place(i) for i in rank_rows or numbers[:1]], bool(rank_rows), -(-len(numbers) // ranks))


def look_ahead(
    shares: Iterator[RankShare], readers: Readers, order: RowOrder, rows_per_step: int
) -> Iterator[tuple[RankShare, list[Row]]]:
    """Yields the shares of all steps with their rows, after the readers know what comes behind.

    They know the places of `order.ahead` rows of all ranks, and the records of so many rows of this rank as they read
    ahead.
    """
    far, near = deque[RankShare](), deque[tuple[RankShare, list[Row]]]()
    rows_ahead, ahead = 0, order.ahead
    for share in itertools.chain(shares, itertools.repeat(None)):
        if share is not None:
            readers.expect(share.places)
            far.append(share)
            if len(far) * rows_per_step <= ahead:
                continue
        while far and rows_ahead < (MOST_NEAR_ROWS if readers.has_room else NEAR_ROWS):
            nearest = far.popleft()
            near.append((nearest, [order.row(place) for place in nearest.places]))
            readers.prepare(near[-1][1])
            rows_ahead += len(nearest.places)
        if not near:
            return
        rows_ahead -= len(near[0][1])
        yield near.popleft()


def _steps(
    readers: Readers, shares: Iterator[tuple[RankShare, list[Row]]], make_batch: Callable[[list[Row]], Batch],
    micro_batch: int, pin_memory: bool,
) -> Generator[list[Batch]]:  # fmt: skip
    with closing(readers):
        for share, rows in shares:
            batches = _micro_batches(make_batch, share, rows, micro_batch)
            yield [batch.map(Tensor.pin_memory) if pin_memory else batch for batch in batches]


def training_steps(  # noqa: PLR0913 (the caches, the shape of a step, and the rank's share of it)
    source: Source, collate: Collate, *, rows_per_step: int, micro_batch: int, seed: int = 0, start_row: int = 0,
    rank: int = 0, ranks: int = 1, row_share: RowShare = WHOLE_ROWS, vocab_size: int | None = None,
    pin_memory: bool = False,
) -> Generator[list[Batch]]:  # fmt: skip
    """Yields, for each step and without end, this rank's micro-batches of at most `micro_batch` rows.

    Of each row the batches have the positions of `row_share`. Entries are cut to the first `vocab_size` tokens (None:
    to each manifest's vocabulary). With `source.prefetch`, a thread makes so many steps ahead. The batches stay the
    same. With `pin_memory`, they are in page-locked memory, from which a GPU copies while it computes.
    """
    order = source.order(collate.row_length, seed)
    readers = Readers(source, order, vocab_size=vocab_size)
    numbers = (range(start, start + rows_per_step) for start in itertools.count(start_row, rows_per_step))
    shares = (share_of_step(order, step, rank, ranks) for step in numbers)
    make_batch = partial(_batch, readers, collate, row_share)
    steps = _steps(readers, look_ahead(shares, readers, order, rows_per_step), make_batch, micro_batch, pin_memory)
    if source.prefetch:
        steps = prefetch(steps, source.prefetch, source.timeout, readers.current_block, readers.stop)
    with closing(steps):
        yield from steps


def all_batches(  # noqa: PLR0913 (the cache, the size of a batch, and the rank's share)
    shards: Shards, collate: Collate, *, micro_batch: int, rank: int, ranks: int, row_share: RowShare = WHOLE_ROWS,
    vocab_size: int | None = None,
) -> Generator[Batch]:  # fmt: skip
    """Yields this rank's share of every record, once and in stored order, for evaluation. Damaged blocks are errors.

    Rank r of n reads the r-th of n equal parts of the rows.
    """
    order = shards.order(collate.row_length, None)
    rank_rows = range(order.rows * rank // ranks, order.rows * (rank + 1) // ranks)
    with closing(Readers(shards, order, False, vocab_size)) as readers:
        # The rows of each micro-batch. Where the rank has none, row 0 stands in.
        numbers = (rank_rows[start : start + micro_batch] for start in range(0, -(-order.rows // ranks), micro_batch))
        shares = (RankShare([order.place(i) for i in some or range(1)], bool(some), 1) for some in numbers)
        for share, rows in look_ahead(shares, readers, order, micro_batch):
            yield from _micro_batches(partial(_batch, readers, collate, row_share), share, rows, micro_batch)
