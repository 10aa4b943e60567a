"""A cache as batches, composed in order:

    manifest ─ order: rows of an epoch ─► this rank's share of a step ─► shards: records ─► collate: batches

The order knows nothing of ranks: a step is `rows_per_step` rows of it, and rank r of n takes rows r, r+n, ….
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.cache.alignment import check_alignment
from data.cache.manifest import Manifest, read_manifest
from data.cache.schema import Record
from data.stream.collate import Collate
from data.stream.order import Row, epoch_rows
from data.stream.shards import ShardReader
from kd_core.errors import UsageError
from kd_core.types import Batch

ALIGNMENT_RECORDS = 8


@dataclass(frozen=True)
class Shards:
    """A teacher cache on disk, read with at most `top_k` entries a position (None: all that are stored)."""

    path: str
    top_k: int | None = None
    shuffle_shards: int = 16

    def __post_init__(self) -> None:
        if (self.top_k is not None and self.top_k < 1) or self.shuffle_shards < 1:
            raise UsageError("shards: wanted top_k ≥ 1 (or None) and shuffle_shards ≥ 1.")

    @cached_property
    def manifest(self) -> Manifest:
        """The cache's manifest."""
        return read_manifest(Path(self.path))

    def reader(self) -> ShardReader:
        """A reader of the cache's shards."""
        return ShardReader(Path(self.path), self.manifest)

    def check(self, vocab_size: int, tokenizer: str) -> None:
        """Refuse a cache of another vocabulary or tokenizer, an empty one, or one whose labels are shifted."""
        found = self.manifest
        if found.vocab_size != vocab_size:
            raise UsageError(f"{self.path}: vocabulary of {found.vocab_size}, the student's is {vocab_size}.")
        if found.tokenizer != tokenizer:
            raise UsageError(
                f"{self.path}: written with tokenizer {found.tokenizer[:12]}…, the student's is {tokenizer[:12]}…. "
                "Export the cache with the student's tokenizer, or take a student of the teacher's."
            )
        if self.top_k is not None and self.top_k > found.top_k:
            raise UsageError(f"shards.top_k: got {self.top_k}; the cache {self.path} holds {found.top_k} entries.")
        reader, lengths = self.reader(), [shard.lengths for shard in found.shards]
        refs = [(s, r) for s, in_shard in enumerate(lengths) for r in range(len(in_shard))]
        if not refs:
            raise UsageError(f"{self.path}: the cache holds no record.")
        check_alignment((reader.record(*ref) for ref in refs[:ALIGNMENT_RECORDS]), self.path)

    def rows(self, row_length: int, seed: int | None, epoch: int) -> list[Row]:
        """All rows of an epoch, in the global order."""
        lengths = [shard.lengths for shard in self.manifest.shards]
        return epoch_rows(lengths, row_length, seed, epoch, self.shuffle_shards)


def _endless_rows(shards: Shards, row_length: int, seed: int, start: int) -> Iterator[Row]:
    """The global order over all epochs, from row `start` on."""
    for epoch in itertools.count():
        rows = shards.rows(row_length, seed, epoch)
        yield from rows[start:]
        start = max(0, start - len(rows))


def _read_row(reader: ShardReader, row: Row, top_k: int | None) -> list[Record]:
    records = [reader.record(*ref) for ref in row.records]
    return records if top_k is None else [record.with_top_k(top_k) for record in records]


def _micro_batches(rows: Sequence[list[Record]], collate: Collate, size: int) -> list[Batch]:
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def training_steps(  # noqa: PLR0913 (the cache, the shape of a step, and which share of it)
    shards: Shards, collate: Collate, *, seed: int, start_row: int, rows_per_step: int, micro_batch: int,
    rank: int, ranks: int,
) -> Iterator[list[Batch]]:  # fmt: skip
    """For each step, this rank's micro-batches of at most `micro_batch` rows; endless."""
    reader = shards.reader()
    order = _endless_rows(shards, collate.row_length, seed, start_row)
    while True:
        step = list(itertools.islice(order, rows_per_step))
        reader.keep_only(set().union(*(row.window for row in step)))
        own = [_read_row(reader, row, shards.top_k) for row in step[rank::ranks]]
        yield _micro_batches(own, collate, micro_batch)


def all_batches(shards: Shards, collate: Collate, *, micro_batch: int, rank: int, ranks: int) -> Iterator[Batch]:
    """Every record once, in stored order: this rank's share, for evaluation."""
    reader = shards.reader()
    own = shards.rows(collate.row_length, None, 0)[rank::ranks]
    for start in range(0, len(own), micro_batch):
        some = own[start : start + micro_batch]
        reader.keep_only(set().union(*(row.window for row in some)))
        yield collate([_read_row(reader, row, shards.top_k) for row in some])
