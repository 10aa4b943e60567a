"""Caches as batches, composed in order:

    manifests ─ order: rows of all epochs, mixed ─► this rank's share of a step ─► readers: records ─► collate: batches
                                                                            └──── by a thread ahead of its use ───┘

The order knows nothing of ranks: a step is `rows_per_step` rows of it, and rank r of n takes rows r, r+n, …. Ranks
are those of data parallelism: all ranks of a tensor-parallel group pass the same rank and size, and see the same batch.
"""

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

from data.stream.collate import Collate
from data.stream.order import Row
from data.stream.prefetch import ahead
from data.stream.readers import Readers
from data.stream.source import Shards, Source
from kd_core.types import Batch


class Share(NamedTuple):
    """Which rows are a rank's: `rank`, `rank` + `ranks`, …."""

    rank: int
    ranks: int


def _batch(readers: Readers, rows: list[Row], collate: Collate) -> Batch:
    read = [readers.read(row) for row in rows]
    return replace(collate([records for records, _ in read]), damaged_blocks=sum(damaged for _, damaged in read))


def _shared(readers: Readers, rows: list[Row], collate: Collate, micro_batch: int, share: Share) -> Generator[Batch]:
    """A rank's batches of some rows: as many on every rank, for all take part in each pass. What is missing on this
    one is made of any row, unscored."""
    own, most = rows[share.rank :: share.ranks], -(-len(rows) // share.ranks)
    for at in range(0, most, micro_batch):
        some = own[at : at + micro_batch]
        yield _batch(readers, some, collate) if some else _batch(readers, rows[:1], collate).unscored()


def _steps(
    readers: Readers, order: Iterator[Row], collate: Collate, shape: tuple[int, int, Share]
) -> Generator[list[Batch]]:
    rows_per_step, micro_batch, share = shape
    with closing(readers):
        while True:
            step = list(itertools.islice(order, rows_per_step))
            readers.hold(step)
            yield list(_shared(readers, step, collate, micro_batch, share))


def training_steps(  # noqa: PLR0913 (the caches, the shape of a step, and which share of it)
    source: Source, collate: Collate, *, seed: int, start_row: int, rows_per_step: int, micro_batch: int,
    rank: int, ranks: int, vocab_size: int | None = None,
) -> Generator[list[Batch]]:  # fmt: skip
    """For each step, this rank's micro-batches of at most `micro_batch` rows; endless.

    Entries are those of the first `vocab_size` tokens (None: of each manifest's). With `source.prefetch`, a thread
    makes so many steps ahead; they are the same.
    """
    readers = Readers(source.parts, vocab_size=vocab_size)
    order = itertools.islice(source.order(collate.row_length, seed), start_row, None)
    steps = _steps(readers, order, collate, (rows_per_step, micro_batch, Share(rank, ranks)))
    if source.prefetch:
        steps = ahead(steps, source.prefetch, source.timeout, readers.doing, readers.stop)
    with closing(steps):
        yield from steps


def all_batches(
    shards: Shards, collate: Collate, *, micro_batch: int, rank: int, ranks: int, vocab_size: int | None = None
) -> Generator[Batch]:
    """Every record once, in stored order: this rank's share, for evaluation. What is damaged stops it."""
    order = shards.rows(collate.row_length, None, 0)
    with closing(Readers([shards], False, vocab_size)) as readers:
        while some := list(itertools.islice(order, micro_batch * ranks)):
            readers.hold(some)
            yield from _shared(readers, some, collate, micro_batch, Share(rank, ranks))
