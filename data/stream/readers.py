"""Readers of the records of packed rows. A damaged cache block is an error, or its records are left out and counted."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from data.cache.record import Record
from data.stream.order import BlockRef, Row
from data.stream.shards import DamagedBlockError
from data.stream.source import Shards
from kd_core.errors import UsageError

log = logging.getLogger("kd")


class CacheReader:
    """A reader of one cache, which remembers the damaged blocks that it skipped."""

    def __init__(self, shards: Shards, may_skip: bool, vocab_size: int | None) -> None:
        self.shards, self.reader, self.vocab_size = shards, shards.reader(), vocab_size
        self.skips = may_skip and shards.on_damage == "skip"
        self.window: frozenset[BlockRef] = frozenset()
        self.damaged: dict[BlockRef, str] = {}

    def block(self, ref: BlockRef) -> list[Record] | None:
        """Returns the records of a block, or None for a damaged block that is skipped.

        Raises:
            DamagedBlockError: the block is damaged, and damaged blocks are not skipped.
            UsageError: the block cannot be read, or more than `max_damaged_blocks` are damaged.
        """
        if ref in self.damaged:
            return None
        try:
            return self.reader.block(ref)
        except DamagedBlockError as error:
            if not self.skips:
                raise
            self.damaged[ref] = str(error)
            log.warning("skipped, and its records are left out: %s", error)
        if len(self.damaged) > self.shards.max_damaged_blocks:
            raise UsageError(
                f"{self.shards.path}: {len(self.damaged)} damaged blocks; wanted at most "
                f"{self.shards.max_damaged_blocks} (shards.max_damaged_blocks):\n  "
                + "\n  ".join(self.damaged.values())
            )
        return None


class Readers:
    """A reader for each cache of a source.

    Without `may_skip`, a damaged block is an error whatever `shards.on_damage` is. `vocab_size` is the student's real
    vocabulary. None takes the vocabulary of each manifest.
    """

    def __init__(self, parts: Sequence[Shards], may_skip: bool = True, vocab_size: int | None = None) -> None:
        self.parts = [CacheReader(part, may_skip, vocab_size) for part in parts]
        self.latest_reader = self.parts[0].reader

    def close(self) -> None:
        """Closes all transfers. Only the reading thread may call it."""
        for part in self.parts:
            part.reader.close()

    def stop(self) -> None:
        """Ends all transfers. Any thread may call it."""
        for part in self.parts:
            part.reader.stop()

    def current_block(self) -> str:
        """Returns the file and block being read, for error messages."""
        return self.latest_reader.current_block

    def hold(self, rows: Sequence[Row]) -> None:
        """Keeps the decoded blocks of these rows and drops all others.

        A cache without a row among them keeps the blocks of its latest row.
        """
        held: list[set[BlockRef]] = [set() for _ in self.parts]
        for row in rows:
            held[row.part] |= row.window
            self.parts[row.part].window = row.window
        for part, blocks in zip(self.parts, held, strict=True):
            part.reader.keep_only(blocks or set(part.window))

    @property
    def has_room(self) -> bool:
        """Returns True if blocks of further rows may be read ahead."""
        return any(part.reader.has_room for part in self.parts)

    def expect(self, rows: Sequence[Row]) -> None:
        """States rows that will be read, behind those that were expected before. Their blocks are read ahead."""
        for index, part in enumerate(self.parts):
            refs = (record[:2] for row in rows if row.part == index for record in row.records)
            part.reader.expect(ref for ref in refs if ref not in part.damaged)

    def read(self, row: Row) -> tuple[list[Record], int]:
        """Returns the undamaged records of a row, cut to what the settings read, and the number of damaged blocks.

        A block is counted with its first record, which is in one row of an epoch on one rank. Counts therefore add up
        over ranks and steps, from any cursor.
        """
        part, records, damaged = self.parts[row.part], list[Record](), 0
        self.latest_reader = part.reader
        for shard, block, index in row.records:
            block_records = part.block((shard, block))
            if block_records is None:
                damaged += index == 0
            else:
                records.append(part.shards.cut(block_records[index], part.vocab_size))
        if len(self.parts) > 1:
            records = [replace(record, name=f"{part.shards.path}:{record.name}") for record in records]
        return records, damaged
