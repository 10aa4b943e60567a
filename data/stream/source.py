"""Sources of a run: one cache (`Shards`), or several mixed by weights (`Mixture`).

Both have the same interface: `parts` are the caches, and `order` finds the rows of all epochs by their numbers, each
with the index of its part.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from data.cache.alignment import check_alignment
from data.cache.codec.rank_tables import RankTables
from data.cache.indexes.lengths import Array
from data.cache.manifest import Manifest, read_manifest
from data.cache.record import Record
from data.storage.storage import storage_at
from data.stream.block_cache import AUTO, BlockCache
from data.stream.block_reader import DamagedBlockError
from data.stream.mixing import MixedOrder
from data.stream.order import CacheOrder
from data.stream.row_counts import count_rows
from data.stream.segments import Segments
from data.stream.shards import ShardReader, read_tables
from kd_core.errors import UsageError
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, SECONDS, SHARE_ABOVE_0, SHARE_BELOW_1, check_settings

log = logging.getLogger("kd")
ALIGNMENT_RECORDS = 8
VOCABULARY_SETTING = "that of the tokenizer in student.folder, or student.vocab_size"


@dataclass(frozen=True)
class Shards:
    """A teacher cache, and how much of each position is read from it.

    Args:
        path: the cache's folder or its URL (s3, gs, az, hf, http, https; docs/storage.md).
        top_k: most entries a position (None: all that are stored).
        min_prob: only entries of at least this probability are read.
        mass: entries are read, the likeliest first, until they hold this mass.
        samples: whether the cache's samples are read as entries in place of the tail. Without them, a cache of top-k
            entries and samples is read as one of top-k entries.
        on_damage: `stop` or `skip`, for a damaged block in training. The records of a skipped block are left out of
            their rows, and `data/damaged_blocks` counts it. Evaluation always stops.
        max_damaged_blocks: most blocks of a cache that a rank skips. With one more it stops and lists them all.
        prefetch: steps that a thread reads and decodes ahead (0: none). Each takes the memory of its batches.
        timeout: seconds to wait for a step that is read ahead.
        retry_seconds: seconds in which a read from a URL that fails is tried again, before the run stops.
        block_cache: folder of this machine that keeps blocks read from a URL, in its subfolder kd-workspace-blocks
            (`auto`: kd-workspace/blocks in the user's cache folder, None: none are kept).
        block_cache_bytes: most bytes of that folder. The blocks not used for the longest time are deleted.
    """

    path: str
    top_k: int | None = None
    min_prob: float = 0.0
    mass: float = 1.0
    samples: bool = True
    on_damage: Literal["stop", "skip"] = "stop"
    max_damaged_blocks: int = 8
    prefetch: int = 2
    timeout: float = 600.0
    retry_seconds: float = 300.0
    block_cache: str | None = AUTO
    block_cache_bytes: int = 64 << 30

    def __post_init__(self) -> None:
        check_settings(
            self, "shards.", top_k=AT_LEAST_1, min_prob=SHARE_BELOW_1, mass=SHARE_ABOVE_0,
            max_damaged_blocks=AT_LEAST_0, prefetch=AT_LEAST_0, timeout=SECONDS,
            retry_seconds=SECONDS, block_cache_bytes=AT_LEAST_1,
        )  # fmt: skip
        storage_at(self.path)

    @property
    def parts(self) -> tuple["Shards", ...]:
        return (self,)

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.path, self.retry_seconds)

    @cached_property
    def tables(self) -> RankTables:
        """Returns the rank tables, read once: a validation makes a reader each time."""
        return read_tables(self.path, self.manifest.tables, self.retry_seconds)

    def use_manifest(self, manifest: Manifest) -> None:
        """Takes the manifest that another rank has read, with the lengths of its records."""
        self.__dict__["manifest"] = manifest

    def reader(self) -> ShardReader:
        block_cache = BlockCache.from_setting(self.block_cache, self.block_cache_bytes)
        return ShardReader(self.path, self.manifest, self.retry_seconds, block_cache, self.tables)

    def check(self, vocab_size: int, tokenizer: str) -> None:
        """Raises for a cache of another vocabulary or tokenizer, without records or scored positions, or misaligned.

        A cache may have more columns than the student's real vocabulary: it was written before exports left padding
        out, or converted without a tokenizer. `Record.within` then reads it. A cache with fewer columns comes from a
        teacher without the last tokens.

        Raises:
            UsageError: the cache or the settings do not fit, or its labels and entries are shifted.
        """
        manifest = self.manifest
        if manifest.vocab_size < vocab_size and manifest.tokenizer != tokenizer:
            raise UsageError(
                f"{self.path}: vocabulary of {manifest.vocab_size}, the student's is {vocab_size} "
                f"({VOCABULARY_SETTING}). Use a student with the teacher's tokenizer."
            )
        if "tokenizer" in manifest.unknown:
            log.warning(
                "%s: converted without a tokenizer; that the student's is the same cannot be checked", self.path
            )
        elif manifest.tokenizer != tokenizer:
            raise UsageError(
                f"{self.path}: written with tokenizer {manifest.tokenizer[:12]}…, the student's is {tokenizer[:12]}…. "
                "Export the cache with the student's tokenizer, or use a student with the teacher's."
            )
        selection = manifest.selection
        if self.top_k is not None and self.top_k > selection.top_k:
            raise UsageError(f"shards.top_k: got {self.top_k}; the cache {self.path} holds {selection.top_k} entries.")
        if not selection.top_k and not self.samples:
            raise UsageError(f"shards.samples: the cache {self.path} holds nothing but samples. Read it with them.")
        if not manifest.records:
            raise UsageError(f"{self.path}: the cache holds no record.")
        if manifest.statistics.get("scored", 1.0) <= 0:
            raise UsageError(
                f"{self.path}: no position of the cache is scored. Export or convert it with labels to score."
            )
        with self.reader() as reader:
            first = [self.within(record, vocab_size) for record in self._first_block(reader)]
            check_alignment(first[:ALIGNMENT_RECORDS], self.path)

    def _first_block(self, reader: ShardReader) -> list[Record]:
        """Returns the records of the first block. Where damaged blocks are skipped, it is the first undamaged one."""
        blocks = ((s, b) for s, shard in enumerate(self.manifest.shards) for b in range(shard.blocks))
        allowed = self.max_damaged_blocks if self.on_damage == "skip" else 0
        *earlier, last = itertools.islice(blocks, allowed + 1)
        for ref in earlier:
            try:
                return reader.block(ref)
            except DamagedBlockError:
                continue
        return reader.block(last)

    def within(self, record: Record, vocab_size: int | None) -> Record:
        """Returns the record over the first `vocab_size` tokens, or as it is if that is None.

        Raises:
            UsageError: a token, or more mass than padding can have, lies beyond them.
        """
        if vocab_size is None or vocab_size >= self.manifest.vocab_size:
            return record
        try:
            return record.within(vocab_size)
        except ValueError as error:
            raise UsageError(
                f"{self.path}: record {record.name} of {record.document}: {error}; the cache has a vocabulary of "
                f"{self.manifest.vocab_size}, the student's is {vocab_size} ({VOCABULARY_SETTING}). Use a student "
                "with the teacher's tokenizer, or export the cache again."
            ) from None

    def cut(self, record: Record, vocab_size: int | None = None) -> Record:
        """Returns the part of a record that is read, over the real vocabulary."""
        record = self.within(record if self.samples else record.without_samples(), vocab_size)
        return record.cut(self.top_k, self.min_prob, self.mass)

    @property
    def sampled(self) -> bool:
        """Returns True where samples are read in place of the tail."""
        return self.samples and self.manifest.selection.draws > 0

    @property
    def entries(self) -> int:
        """Returns the most entries that are read of a position, samples included."""
        selection = self.manifest.selection
        top_k = selection.top_k if self.top_k is None else min(self.top_k, selection.top_k)
        return top_k + (selection.draws if self.sampled else 0)

    @cached_property
    def _counted(self) -> dict[int, tuple[Segments, Array]]:
        """Returns the segments and their numbers of rows, by row length."""
        return {}

    def order(self, row_length: int, seed: int | None) -> CacheOrder:
        """Returns the order of the rows of all epochs. Without a seed it is the stored one.

        Raises:
            UsageError: a record is longer than a row.
        """
        if row_length not in self._counted:
            self._counted[row_length] = count_rows(self.manifest, row_length)
        return CacheOrder(self.manifest.lengths, *self._counted[row_length], row_length, seed)


@dataclass(frozen=True)
class Mixture:
    """Several caches mixed by weights. Each has its weight's share of a run's scored positions.

    A row holds records of one cache, and a cache's rows come in its own order, but for neighbours of some 100 rows. A
    cache that ends begins its next epoch. Its rows count with the mean of their scored positions, so the shares are
    exact over whole epochs. At any time they are so to a few rows, but rows of a share below 1/64 come in bursts.

    Args:
        caches: caches by name, each with its own settings.
        weights: shares of the caches by the same names, in any unit.
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
        """Returns the caches in the order of their names, whatever the order of the dictionary."""
        return tuple(self.caches[name] for name in sorted(self.caches))

    @property
    def prefetch(self) -> int:
        """Returns the steps to read ahead: the most of any cache."""
        return max(part.prefetch for part in self.parts)

    @property
    def timeout(self) -> float:
        """Returns the seconds to wait for a step: the most of any cache."""
        return max(part.timeout for part in self.parts)

    def order(self, row_length: int, seed: int) -> MixedOrder:
        """Returns the order of the rows of all caches, interleaved by the weights.

        Raises:
            UsageError: no position of a cache is scored, or a record is longer than a row.
        """
        costs, orders = list[float](), list[CacheOrder]()
        for name, part in zip(sorted(self.caches), self.parts, strict=True):
            scored = part.manifest.statistics.get("scored", 1.0)
            if not scored > 0 or not part.manifest.records:
                raise UsageError(
                    f"{part.path}: no position of the cache is scored, so it cannot have a share of a mixture."
                )
            orders.append(part.order(row_length, seed))
            costs.append(scored * part.manifest.positions / orders[-1].rows / self.weights[name])
        return MixedOrder(orders, costs)


Source = Shards | Mixture
RowOrder = CacheOrder | MixedOrder


class CachePasses(NamedTuple):
    """The number of epochs of a cache that a run reads, and the rows of one epoch."""

    shards: Shards
    times: float
    rows: int


def count_passes(source: Source, row_length: int, seed: int, rows: int) -> list[CachePasses]:
    """Returns the epochs of each cache that a run of `rows` rows reads.

    Raises:
        UsageError: as for `order`.
    """
    return [
        CachePasses(part, share * rows / epoch, epoch)
        for part, (share, epoch) in zip(source.parts, source.order(row_length, seed).shares, strict=True)
    ]


def format_passes(cache_passes: Sequence[CachePasses]) -> str:
    """Returns `1.50 epochs of 40 rows`. With several caches, each names its path."""
    several = len(cache_passes) > 1
    return ", ".join(
        f"{cache.times:.2f} epochs of {cache.rows} rows{f' of {cache.shards.path}' if several else ''}"
        for cache in cache_passes
    )
