"""The records of rows, out of the caches of a source; what is damaged there is an error, or is left out and counted."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from data.cache.record import Record
from data.stream.order import BlockRef, Row
from data.stream.shards import DamagedError
from data.stream.source import Shards
from kd_core.errors import UsageError

log = logging.getLogger("kd")


class PartReader:
    """One cache: its blocks, and which of them are damaged."""

    def __init__(self, shards: Shards, may_skip: bool, vocab_size: int | None) -> None:
        self.shards, self.reader, self.vocab_size = shards, shards.reader(), vocab_size
        self.skips = may_skip and shards.on_damage == "skip"
        self.window: frozenset[BlockRef] = frozenset()
        self.damaged: dict[BlockRef, str] = {}

    def block(self, ref: BlockRef) -> list[Record] | None:
        """The records of a block; None where it is damaged and such are skipped.

        Raises:
            DamagedError: it is damaged, and such are not skipped.
            UsageError: it cannot be had, or more are damaged than may be.
        """
        if ref in self.damaged:
            return None
        try:
            return self.reader.block(ref)
        except DamagedError as error:
            if not self.skips:
                raise
            self.damaged[ref] = str(error)
            log.warning("skipped, the records of it are left out: %s", error)
        if len(self.damaged) > self.shards.max_damaged_blocks:
            raise UsageError(
                f"{self.shards.path}: {len(self.damaged)} damaged blocks; wanted at most "
                f"{self.shards.max_damaged_blocks} (shards.max_damaged_blocks):\n  "
                + "\n  ".join(self.damaged.values())
            )
        return None


class Readers:
    """A reader for each cache of a source; without `may_skip`, what is damaged is an error whatever they say.

    `vocab_size` is the student's real vocabulary; None: that of each manifest.
    """

    def __init__(self, parts: Sequence[Shards], may_skip: bool = True, vocab_size: int | None = None) -> None:
        self.parts = [PartReader(part, may_skip, vocab_size) for part in parts]
        self.latest = self.parts[0].reader

    def close(self) -> None:
        """Close all transfers; by the thread that reads."""
        for part in self.parts:
            part.reader.close()

    def stop(self) -> None:
        """End all transfers, from any thread."""
        for part in self.parts:
            part.reader.stop()

    def doing(self) -> str:
        """What is read, in words."""
        return self.latest.doing

    def hold(self, rows: Sequence[Row]) -> None:
        """Hold the blocks of these rows, forget all others; a cache without a row among them keeps what it has."""
        held: list[set[BlockRef]] = [set() for _ in self.parts]
        for row in rows:
            held[row.part] |= row.window
            self.parts[row.part].window = row.window
        for part, blocks in zip(self.parts, held, strict=True):
            part.reader.keep_only(blocks or set(part.window))

    def read(self, row: Row) -> tuple[list[Record], int]:
        """The records of a row that are not damaged, cut to what is to be read of them; damaged blocks to count.

        A block is counted with its first record, which stands in one row of an epoch, on one rank: so the counts of
        ranks and steps add up, from any cursor.
        """
        part, records, damaged = self.parts[row.part], list[Record](), 0
        self.latest = part.reader
        for shard, block, index in row.records:
            found = part.block((shard, block))
            if found is None:
                damaged += index == 0
            else:
                records.append(part.shards.cut(found[index], part.vocab_size))
        if len(self.parts) > 1:
            records = [replace(record, name=f"{part.shards.path}:{record.name}") for record in records]
        return records, damaged
