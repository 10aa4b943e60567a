"""Readers of the records of packed rows. A damaged cache block is an error, or its records are left out and counted.

A block is decoded for the first row that needs it. Of its records, those of the rank's rows to come are kept, each
until its row is read.

    places of rows to come ─ expect ──► which records of a decoded block are kept
    the nearest of these rows ─ prepare ─► blocks to read ahead
    a row ─ read ─► its records
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.cache.record import Record
from data.stream.block_reader import DamagedBlockError
from data.stream.order import BlockRef, CacheOrder, Place, RecordRef, Row
from data.stream.source import RowOrder, Shards, Source
from kd_core.errors import UsageError

log = logging.getLogger("kd")
DETACHED_SHARE = 4  # a block is freed when one in so many of its kept records is left


@dataclass
class _Held:
    """Records of one block that are still to be read, by their index. When `detach_at` are left, they are copied."""

    records: dict[int, Record]
    detach_at: int


class CacheReader:
    """A reader of one cache. It keeps the records that expected rows need, and remembers damaged blocks."""

    def __init__(self, shards: Shards, order: CacheOrder, may_skip: bool, vocab_size: int | None) -> None:
        self.shards, self.order, self.reader, self.vocab_size = shards, order, shards.reader(), vocab_size
        self.skips = may_skip and shards.on_damage == "skip"
        self.expected = set[Place]()
        self.needed = dict[BlockRef, None]()  # blocks to decode, in the order of need
        self.held = dict[BlockRef, _Held]()
        self.damaged: dict[BlockRef, str] = {}

    def prepare(self, row: Row) -> None:
        """Adds the blocks of a row to those that are needed, unless they are decoded."""
        for *block, index in row.records:
            held = self.held.get((block[0], block[1]))
            if (held is None or index not in held.records) and (block[0], block[1]) not in self.damaged:
                self.needed[block[0], block[1]] = None

    def take(self, ref: RecordRef, place: Place) -> Record | None:
        """Returns a record of the row at a place and drops it here, or None where its block is damaged and skipped.

        Raises:
            DamagedBlockError: the block is damaged, and damaged blocks are not skipped.
            UsageError: the block cannot be read, or more than `max_damaged_blocks` are damaged.
        """
        block, index = ref[:2], ref[2]
        held = self.held.get(block)
        if (held is None or index not in held.records) and (held := self._decode(block, place)) is None:
            return None
        record = held.records.pop(index)
        if not held.records:
            del self.held[block]
        elif len(held.records) == held.detach_at:
            held.records = {i: record.detached() for i, record in held.records.items()}
        return record

    def _decode(self, block: BlockRef, place: Place) -> _Held | None:
        """Decodes a block, and keeps its records of the row at a place and of the expected ones."""
        self.needed.pop(block, None)
        if (records := self._read(block)) is None:
            return None
        places = enumerate(self.order.places_of_block(block, place._replace(part=0)))
        expected = {i: records[i] for i, row in places if row.row == place.row or row in self.expected}
        self.held[block] = _Held(expected, len(records) // DETACHED_SHARE)
        return self.held[block]

    def _read(self, ref: BlockRef) -> list[Record] | None:
        if ref in self.damaged:
            return None
        try:
            records = self.reader.block(ref)
        except DamagedBlockError as error:
            if not self.skips:
                raise
            self.damaged[ref] = str(error)
            log.warning("skipped, and its records are left out: %s", error)
        else:
            self.reader.keep_only(set())
            return records
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

    def __init__(self, source: Source, order: RowOrder, may_skip: bool = True, vocab_size: int | None = None) -> None:
        parts = zip(source.parts, order.orders, strict=True)
        self.parts = [CacheReader(part, part_order, may_skip, vocab_size) for part, part_order in parts]
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

    def expect(self, places: Sequence[Place]) -> None:
        """Announces rows that will be read."""
        for place in places:
            self.parts[place.part].expected.add(place._replace(part=0))

    def prepare(self, rows: Sequence[Row]) -> None:
        """Announces rows that will be read next, in this order. Their blocks may be read ahead."""
        for row in rows:
            self.parts[row.place.part].prepare(row)
        for part in self.parts:
            part.reader.expect(part.needed)

    @property
    def has_room(self) -> bool:
        """Returns True if blocks of further rows may be read ahead."""
        return any(part.reader.has_room for part in self.parts)

    def read(self, row: Row) -> tuple[list[Record], int]:
        """Returns the undamaged records of a row, cut to what the settings read, and the number of damaged blocks.

        A block is counted with its first record, which is in one row of an epoch on one rank. Counts therefore add up
        over ranks and steps, from any cursor.
        """
        part, records, damaged = self.parts[row.place.part], list[Record](), 0
        self.latest_reader = part.reader
        part.expected.discard(row.place._replace(part=0))
        for ref in row.records:
            record = part.take(ref, row.place)
            if record is None:
                damaged += ref[2] == 0
            else:
                records.append(part.shards.cut(record, part.vocab_size))
        if len(self.parts) > 1:
            records = [replace(record, name=f"{part.shards.path}:{record.name}") for record in records]
        return records, damaged
