"""A cache as batches, composed in order:

    manifest ─ order: rows of an epoch ─► this rank's share of a step ─► shards: records ─► collate: batches

The order knows nothing of ranks: a step is `rows_per_step` rows of it, and rank r of n takes rows r, r+n, ….
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from data.cache.alignment import check_alignment
from data.cache.manifest import Manifest
from data.cache.record import Record
from data.stream.collate import Collate
from data.stream.location import Location
from data.stream.order import Row, epoch_rows
from data.stream.shards import ShardReader, manifest_at
from kd_core.errors import UsageError
from kd_core.types import Batch

ALIGNMENT_RECORDS = 8


@dataclass(frozen=True)
class Shards:
    """A teacher cache, and how much of each position is read.

    Args:
        path: the cache's folder, or the URL of one (http, https, gs, ais).
        top_k: at most so many entries (None: all that are stored).
        min_prob: only entries of at least this probability.
        mass: entries until they hold this mass.
        samples: whether a cache's samples are read as entries in place of the tail; without them a cache of head and
            samples is one of its head.
        shuffle_shards: shards that are read side by side and shuffled together.
    """

    path: str
    top_k: int | None = None
    min_prob: float = 0.0
    mass: float = 1.0
    samples: bool = True
    shuffle_shards: int = 16

    def __post_init__(self) -> None:
        if (self.top_k is not None and self.top_k < 1) or self.shuffle_shards < 1:
            raise UsageError("shards: wanted top_k ≥ 1 (or None) and shuffle_shards ≥ 1.")
        Location(self.path)
        if not (0 <= self.min_prob < 1 and 0 < self.mass <= 1):
            raise UsageError(
                f"shards: min_prob={self.min_prob}, mass={self.mass}; wanted 0 ≤ min_prob < 1, 0 < mass ≤ 1."
            )

    @cached_property
    def manifest(self) -> Manifest:
        """The cache's manifest."""
        return manifest_at(Location(self.path))

    def reader(self) -> ShardReader:
        """A reader of the cache's shards."""
        return ShardReader(self.path, self.manifest)

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
        kept = found.selection
        if self.top_k is not None and self.top_k > kept.top_k:
            raise UsageError(f"shards.top_k: got {self.top_k}; the cache {self.path} holds {kept.top_k} entries.")
        if not kept.top_k and not self.samples:
            raise UsageError(f"shards.samples: the cache {self.path} holds nothing but samples. Read it with them.")
        blocks = [(s, b) for s, shard in enumerate(found.shards) for b in range(len(shard.blocks))]
        if not blocks:
            raise UsageError(f"{self.path}: the cache holds no record.")
        with self.reader() as reader:
            check_alignment(reader.block(blocks[0])[:ALIGNMENT_RECORDS], self.path)

    def cut(self, record: Record) -> Record:
        """What is read of a record."""
        record = record if self.samples else record.without_samples()
        return record.cut(self.top_k, self.min_prob, self.mass)

    @property
    def sampled(self) -> bool:
        """Whether samples stand in the place of the tail."""
        return self.samples and self.manifest.selection.draws > 0

    @property
    def entries(self) -> int:
        """The most entries that are read of a position."""
        kept = self.manifest.selection
        head = kept.top_k if self.top_k is None else min(self.top_k, kept.top_k)
        return head + (kept.draws if self.sampled else 0)

    def rows(self, row_length: int, seed: int | None, epoch: int) -> list[Row]:
        """All rows of an epoch, in the global order."""
        lengths = [[block.lengths for block in shard.blocks] for shard in self.manifest.shards]
        return epoch_rows(lengths, row_length, seed, epoch, self.shuffle_shards)


def _endless_rows(shards: Shards, row_length: int, seed: int, start: int) -> Iterator[Row]:
    """The global order over all epochs, from row `start` on."""
    for epoch in itertools.count():
        rows = shards.rows(row_length, seed, epoch)
        yield from rows[start:]
        start = max(0, start - len(rows))


def _read_row(reader: ShardReader, row: Row, shards: Shards) -> list[Record]:
    return [shards.cut(reader.record(ref)) for ref in row.records]


def _micro_batches(rows: Sequence[list[Record]], collate: Collate, size: int) -> list[Batch]:
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def training_steps(  # noqa: PLR0913 (the cache, the shape of a step, and which share of it)
    shards: Shards, collate: Collate, *, seed: int, start_row: int, rows_per_step: int, micro_batch: int,
    rank: int, ranks: int,
) -> Iterator[list[Batch]]:  # fmt: skip
    """For each step, this rank's micro-batches of at most `micro_batch` rows; endless."""
    order = _endless_rows(shards, collate.row_length, seed, start_row)
    with shards.reader() as reader:
        while True:
            step = list(itertools.islice(order, rows_per_step))
            reader.keep_only(set().union(*(row.window for row in step)))
            own = [_read_row(reader, row, shards) for row in step[rank::ranks]]
            yield _micro_batches(own, collate, micro_batch)


def all_batches(shards: Shards, collate: Collate, *, micro_batch: int, rank: int, ranks: int) -> Iterator[Batch]:
    """Every record once, in stored order: this rank's share, for evaluation."""
    own = shards.rows(collate.row_length, None, 0)[rank::ranks]
    with shards.reader() as reader:
        for start in range(0, len(own), micro_batch):
            some = own[start : start + micro_batch]
            reader.keep_only(set().union(*(row.window for row in some)))
            yield collate([_read_row(reader, row, shards) for row in some])
