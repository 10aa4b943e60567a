"""Caches as batches, composed in order:

    manifests ─ order: rows of all epochs, mixed ─► this rank's share of a step ─► shards: records ─► collate: batches

The order knows nothing of ranks: a step is `rows_per_step` rows of it, and rank r of n takes rows r, r+n, …. Ranks
are those of data parallelism: all ranks of a tensor-parallel group pass the same rank and size, and see the same batch.
"""

import itertools
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

from data.cache.record import Record
from data.stream.collate import Collate
from data.stream.order import BlockRef, Row
from data.stream.source import Shards, Source
from kd_core.types import Batch


class Readers:
    """A reader for each cache of a source, and the records of rows."""

    def __init__(self, parts: Sequence[Shards]) -> None:
        self.parts = parts
        self.readers = [part.reader() for part in parts]
        self.windows: list[frozenset[BlockRef]] = [frozenset() for _ in parts]

    def close(self) -> None:
        """Close all transfers."""
        for reader in self.readers:
            reader.close()

    def hold(self, rows: Sequence[Row]) -> None:
        """Hold the blocks of these rows, forget all others; a cache without a row among them keeps what it has."""
        held: list[set[BlockRef]] = [set() for _ in self.parts]
        for row in rows:
            held[row.part] |= row.window
            self.windows[row.part] = row.window
        for reader, blocks, latest in zip(self.readers, held, self.windows, strict=True):
            reader.keep_only(blocks or set(latest))

    def read(self, row: Row) -> list[Record]:
        """The records of a row, cut to what is to be read of them."""
        part, reader = self.parts[row.part], self.readers[row.part]
        records = [part.cut(reader.record(ref)) for ref in row.records]
        if len(self.parts) == 1:
            return records
        return [replace(record, name=f"{part.path}:{record.name}") for record in records]


def _micro_batches(rows: Sequence[list[Record]], collate: Collate, size: int) -> list[Batch]:
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def training_steps(  # noqa: PLR0913 (the caches, the shape of a step, and which share of it)
    source: Source, collate: Collate, *, seed: int, start_row: int, rows_per_step: int, micro_batch: int,
    rank: int, ranks: int,
) -> Generator[list[Batch]]:  # fmt: skip
    """For each step, this rank's micro-batches of at most `micro_batch` rows; endless."""
    order = itertools.islice(source.order(collate.row_length, seed), start_row, None)
    with closing(Readers(source.parts)) as readers:
        while True:
            step = list(itertools.islice(order, rows_per_step))
            readers.hold(step)
            yield _micro_batches([readers.read(row) for row in step[rank::ranks]], collate, micro_batch)


def all_batches(shards: Shards, collate: Collate, *, micro_batch: int, rank: int, ranks: int) -> Generator[Batch]:
    """Every record once, in stored order: this rank's share, for evaluation."""
    own = itertools.islice(shards.rows(collate.row_length, None, 0), rank, None, ranks)
    with closing(Readers([shards])) as readers:
        while some := list(itertools.islice(own, micro_batch)):
            readers.hold(some)
            yield collate([readers.read(row) for row in some])
