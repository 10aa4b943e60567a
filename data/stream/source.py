"""What a run reads: one cache, or several mixed by weights. Their order, and the records of a row.

Both are used alike: `parts` are the caches, `order` the rows of all epochs, each with the part that it is of.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from data.cache.alignment import check_alignment
from data.cache.manifest import Manifest
from data.cache.record import Record
from data.cache.storage import storage_at
from data.stream.mixing import interleave
from data.stream.order import Row, endless_rows, epoch_rows
from data.stream.shards import DamagedError, ShardReader, manifest_at
from kd_core.errors import UsageError
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, SECONDS, SHARE_ABOVE_0, SHARE_BELOW_1, check_ranges

log = logging.getLogger("kd")
ALIGNMENT_RECORDS = 8
LOOKED_AT = 5_000  # rows
ON_DAMAGE = ("stop", "skip")
SAID_BY = "that of the tokenizer in student.folder, or student.vocab_size"


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
        on_damage: what to do when training meets a damaged block: stop, or skip it. Its records are then left out of
            their rows, and `data/damaged_blocks` counts it. Evaluation always stops.
        max_damaged_blocks: a rank that has skipped more of a cache since its start stops, and names them all.
        prefetch: steps that a thread reads and decodes ahead (0: none). Each takes the memory of its batches.
        timeout: seconds to wait for a step that is read ahead.
    """

    path: str
    top_k: int | None = None
    min_prob: float = 0.0
    mass: float = 1.0
    samples: bool = True
    shuffle_shards: int = 16
    on_damage: str = "stop"
    max_damaged_blocks: int = 8
    prefetch: int = 2
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_ranges(
            self, "shards.", top_k=AT_LEAST_1, min_prob=SHARE_BELOW_1, mass=SHARE_ABOVE_0, shuffle_shards=AT_LEAST_1,
            max_damaged_blocks=AT_LEAST_0, prefetch=AT_LEAST_0, timeout=SECONDS,
        )  # fmt: skip
        if self.on_damage not in ON_DAMAGE:
            raise UsageError(f"shards.on_damage: got {self.on_damage!r}; wanted one of {', '.join(ON_DAMAGE)}.")
        storage_at(self.path)

    @property
    def parts(self) -> tuple["Shards", ...]:
        """The caches: this one."""
        return (self,)

    @cached_property
    def manifest(self) -> Manifest:
        """The cache's manifest."""
        return manifest_at(self.path)

    def reader(self) -> ShardReader:
        """A reader of the cache's shards."""
        return ShardReader(self.path, self.manifest)

    def check(self, vocab_size: int, tokenizer: str) -> None:
        """Refuse a cache of another vocabulary or tokenizer, an empty one, or one whose labels are shifted.

        A cache of more columns than the student's real vocabulary, written before the export left padding out or
        converted without a tokenizer, is read by `Record.within`. One of fewer has a teacher without the last tokens.
        """
        found = self.manifest
        if found.vocab_size < vocab_size and found.tokenizer != tokenizer:
            raise UsageError(
                f"{self.path}: vocabulary of {found.vocab_size}, the student's is {vocab_size} ({SAID_BY}). Take a "
                "student of the teacher's tokenizer."
            )
        if "tokenizer" in found.unknown:
            log.warning(
                "%s: converted without a tokenizer; that the student's is the same cannot be checked", self.path
            )
        elif found.tokenizer != tokenizer:
            raise UsageError(
                f"{self.path}: written with tokenizer {found.tokenizer[:12]}…, the student's is {tokenizer[:12]}…. "
                "Export the cache with the student's tokenizer, or take a student of the teacher's."
            )
        kept = found.selection
        if self.top_k is not None and self.top_k > kept.top_k:
            raise UsageError(f"shards.top_k: got {self.top_k}; the cache {self.path} holds {kept.top_k} entries.")
        if not kept.top_k and not self.samples:
            raise UsageError(f"shards.samples: the cache {self.path} holds nothing but samples. Read it with them.")
        if not found.records:
            raise UsageError(f"{self.path}: the cache holds no record.")
        if found.statistics.get("scored", 1.0) <= 0:
            raise UsageError(
                f"{self.path}: no position of the cache is scored. Export or convert it with labels to score."
            )
        with self.reader() as reader:
            first = [self.within(record, vocab_size) for record in self._first_block(reader)]
            check_alignment(first[:ALIGNMENT_RECORDS], self.path)

    def _first_block(self, reader: ShardReader) -> list[Record]:
        """The first block; the first that is not damaged where such are skipped."""
        blocks = [(s, b) for s, shard in enumerate(self.manifest.shards) for b in range(len(shard.blocks))]
        allowed = self.max_damaged_blocks if self.on_damage == "skip" else 0
        for ref in blocks[:allowed]:
            try:
                return reader.block(ref)
            except DamagedError:
                continue
        return reader.block(blocks[min(allowed, len(blocks) - 1)])

    def within(self, record: Record, vocab_size: int | None) -> Record:
        """Returns the record over the real vocabulary; None: that of the manifest.

        Raises:
            UsageError: a token, or more mass than padding has, lies beyond it.
        """
        if vocab_size is None or vocab_size >= self.manifest.vocab_size:
            return record
        try:
            return record.within(vocab_size)
        except ValueError as error:
            raise UsageError(
                f"{self.path}: record {record.name} of {record.document}: {error}; the cache has a vocabulary of "
                f"{self.manifest.vocab_size}, the student's is {vocab_size} ({SAID_BY}). Take a student of the "
                "teacher's tokenizer, or export the cache again."
            ) from None

    def cut(self, record: Record, vocab_size: int | None = None) -> Record:
        """Returns the part of a record that is read, over the real vocabulary."""
        record = self.within(record if self.samples else record.without_samples(), vocab_size)
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

    @property
    def lengths(self) -> list[list[tuple[int, ...]]]:
        """Positions by shard, block, record."""
        return [[block.lengths for block in shard.blocks] for shard in self.manifest.shards]

    def rows(self, row_length: int, seed: int | None, epoch: int) -> Iterator[Row]:
        """All rows of an epoch, in the global order."""
        return epoch_rows(self.lengths, row_length, seed, epoch, self.shuffle_shards)

    def order(self, row_length: int, seed: int) -> Iterator[Row]:
        """The rows of all epochs."""
        return endless_rows(self.lengths, row_length, seed, self.shuffle_shards)


@dataclass(frozen=True)
class Mixture:
    """Several caches, mixed by weights: of the scored positions of a run, each has its weight's share, exactly.

    A cache's rows are of it alone, and come in its own order; a cache that ends begins its next epoch. What counts is
    positions, times the share of them that is scored, which the manifest states for a cache as a whole: shares are
    exact to a row at any time where all positions of a cache are scored, else over whole epochs of it.

    Args:
        caches: by a name for each, each with its own settings.
        weights: their shares by the same names, in any unit.
    """

    caches: Mapping[str, Shards]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.caches or set(self.caches) != set(self.weights):
            raise UsageError(
                f"shards: caches {', '.join(self.caches) or 'none'}; weights of {', '.join(self.weights) or 'none'}. "
                "Wanted one weight a cache, under its name."
            )
        if not all(0 < weight < math.inf for weight in self.weights.values()):
            raise UsageError(f"shards.weights: got {dict(self.weights)}; wanted numbers above 0. Leave a cache out.")

    @property
    def parts(self) -> tuple[Shards, ...]:
        """The caches, by name: the order in which they are written down means nothing."""
        return tuple(self.caches[name] for name in sorted(self.caches))

    @property
    def prefetch(self) -> int:
        """Steps ahead: as many as any cache wants."""
        return max(part.prefetch for part in self.parts)

    @property
    def timeout(self) -> float:
        """Seconds to wait: as many as any cache wants."""
        return max(part.timeout for part in self.parts)

    def order(self, row_length: int, seed: int) -> Iterator[Row]:
        """The rows of all parts' epochs, interleaved."""
        costs: list[float] = []
        for name, part in zip(sorted(self.caches), self.parts, strict=True):
            scored = part.manifest.statistics.get("scored", 1.0)
            if not scored > 0 or not part.manifest.records:
                raise UsageError(f"{part.path}: no position of the cache is scored; it can have no share of a mixture.")
            costs.append(scored / self.weights[name])
        return interleave([part.order(row_length, seed) for part in self.parts], costs)


Source = Shards | Mixture


class Passes(NamedTuple):
    """How often a run goes through a cache, and the rows of one epoch of it."""

    shards: Shards
    times: float
    rows: int


def passes(source: Source, row_length: int, seed: int, rows: int) -> list[Passes]:
    """How often a run of so many rows goes through each of its caches; of a long run by the shares of its start."""
    looked = min(rows, LOOKED_AT)
    taken: list[int] = [0] * len(source.parts)
    for row in itertools.islice(source.order(row_length, seed), looked):
        taken[row.part] += 1
    found: list[Passes] = []
    for count, part in zip(taken, source.parts, strict=True):
        epoch = sum(1 for _ in part.rows(row_length, seed, 0))
        found.append(Passes(part, count * rows / looked / epoch, epoch))
    return found


def in_words(found: Sequence[Passes]) -> str:
    """`1.50 epochs of 40 rows`; of several caches, each with its path."""
    several = len(found) > 1
    return ", ".join(
        f"{each.times:.2f} epochs of {each.rows} rows{f' of {each.shards.path}' if several else ''}" for each in found
    )
