"""Streams of batches from caches, composed of these steps:

    manifests ─ order: rows of all epochs, mixed ─► this rank's share of a step ─► readers: records ─► collate: batches
                                                                            └──── by a thread ahead of its use ───┘

The order does not depend on ranks. A step is `rows_per_step` rows of it, and rank r of n takes rows r, r+n, …. Ranks
are data-parallel ranks: all ranks of a tensor-parallel group pass the same rank and size, and get the same batch.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from data.stream.collate import Collate
from data.stream.order import Row
from data.stream.prefetch import prefetch
from data.stream.readers import Readers
from data.stream.source import Shards, Source
from kd_core.types import Batch

MOST_STEPS_AHEAD = 256  # steps whose rows are looked at before they are read


class Share(NamedTuple):
    """A rank's share of the rows of a step: rows `rank`, `rank` + `ranks`, …."""

    rank: int
    ranks: int

    def of(self, rows: list[Row]) -> list[Row]:
        """Returns this rank's rows of a step."""
        return rows[self.rank :: self.ranks]


def _batch(readers: Readers, rows: list[Row], collate: Collate) -> Batch:
    results = [readers.read(row) for row in rows]
    return replace(collate([records for records, _ in results]), damaged_blocks=sum(damaged for _, damaged in results))


def _micro_batches(
    readers: Readers, rows: list[Row], collate: Collate, micro_batch: int, share: Share
) -> Generator[Batch]:
    """Yields a rank's micro-batches of some rows: equally many on every rank, because all ranks join in each pass.

    A rank without rows left takes an unscored batch of the first row in place of a missing one.
    """
    rank_rows, most_rows = share.of(rows), -(-len(rows) // share.ranks)
    for start in range(0, most_rows, micro_batch):
        taken = rank_rows[start : start + micro_batch]
        yield _batch(readers, taken, collate) if taken else _batch(readers, rows[:1], collate).unscored()


def _expected_steps(readers: Readers, steps: Iterator[list[Row]], share: Share) -> Iterator[list[Row]]:
    """Yields the steps. The readers hear of this rank's rows of as many further steps as they read ahead."""
    upcoming = deque[list[Row]]()
    for step in steps:
        upcoming.append(step)
        readers.expect(share.of(step))
        if len(upcoming) >= MOST_STEPS_AHEAD or not readers.has_room:
            yield upcoming.popleft()
    yield from upcoming


def _steps(
    readers: Readers, order: Iterator[Row], collate: Collate, shape: tuple[int, int, Share], pin_memory: bool
) -> Generator[list[Batch]]:
    rows_per_step, micro_batch, share = shape
    steps = (list(itertools.islice(order, rows_per_step)) for _ in itertools.count())
    with closing(readers):
        for step in _expected_steps(readers, steps, share):
            readers.hold(step)
            batches = _micro_batches(readers, step, collate, micro_batch, share)
            yield [batch.map(Tensor.pin_memory) if pin_memory else batch for batch in batches]


def training_steps(  # noqa: PLR0913 (the caches, the shape of a step, and the rank's share of it)
    source: Source, collate: Collate, *, rows_per_step: int, micro_batch: int, seed: int = 0, start_row: int = 0,
    rank: int = 0, ranks: int = 1, vocab_size: int | None = None, pin_memory: bool = False,
) -> Generator[list[Batch]]:  # fmt: skip
    """Yields, for each step and without end, this rank's micro-batches of at most `micro_batch` rows.

    Entries are cut to the first `vocab_size` tokens (None: to each manifest's vocabulary). With `source.prefetch`, a
    thread makes so many steps ahead. The batches stay the same. With `pin_memory`, they are in page-locked memory,
    from which a GPU copies while it computes.
    """
    readers = Readers(source.parts, vocab_size=vocab_size)
    order = itertools.islice(source.order(collate.row_length, seed), start_row, None)
    steps = _steps(readers, order, collate, (rows_per_step, micro_batch, Share(rank, ranks)), pin_memory)
    if source.prefetch:
        steps = prefetch(steps, source.prefetch, source.timeout, readers.current_block, readers.stop)
    with closing(steps):
        yield from steps


def all_batches(
    shards: Shards, collate: Collate, *, micro_batch: int, rank: int, ranks: int, vocab_size: int | None = None
) -> Generator[Batch]:
    """Yields this rank's share of every record, once and in stored order, for evaluation. Damaged blocks are errors."""
    order = shards.rows(collate.row_length, None, 0)
    with closing(Readers([shards], False, vocab_size)) as readers:
        share, size = Share(rank, ranks), micro_batch * ranks
        passes = iter(lambda: list(itertools.islice(order, size)), [])
        for rows in _expected_steps(readers, passes, share):
            readers.hold(rows)
            yield from _micro_batches(readers, rows, collate, micro_batch, share)
