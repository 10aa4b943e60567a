"""Readers of the records of packed rows. A damaged cache block is an error, or its records are left out and counted.

    rows to come ─ expect ─► records to keep, blocks to read ahead ─ read ─► the records of a row, each kept until then
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.cache.record import Record
from data.stream.order import BlockRef, RecordRef, Row
from data.stream.shards import DamagedBlockError
from data.stream.source import Shards
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

    def __init__(self, shards: Shards, may_skip: bool, vocab_size: int | None) -> None:
        self.shards, self.reader, self.vocab_size = shards, shards.reader(), vocab_size
        self.skips = may_skip and shards.on_damage == "skip"
        self.uses = Counter[RecordRef]()  # rows to come, by record
        self.needed = dict[BlockRef, None]()  # blocks to decode, in the order of need
        self.held = dict[BlockRef, _Held]()
        self.damaged: dict[BlockRef, str] = {}

    def expect(self, refs: Sequence[RecordRef]) -> None:
        """Adds the records of a row to come."""
        for shard, block, index in refs:
            self.uses[shard, block, index] += 1
            held = self.held.get((shard, block))
            if (held is None or index not in held.records) and (shard, block) not in self.damaged:
                self.needed[shard, block] = None

    def take(self, ref: RecordRef) -> Record | None:
        """Returns a record, or None where its block is damaged and skipped. It is dropped after its last use.

        Raises:
            DamagedBlockError: the block is damaged, and damaged blocks are not skipped.
            UsageError: the block cannot be read, or more than `max_damaged_blocks` are damaged.
        """
        self.uses[ref] -= 1
        if (is_last := self.uses[ref] <= 0):
            del self.uses[ref]
        held, index = self.held.get(ref[:2]), ref[2]
        if (held is None or index not in held.records) and (held := self._decode(ref)) is None:
            return None
        record = held.records.pop(index) if is_last else held.records[index]
        if not held.records:
            self.held.pop(ref[:2], None)
        elif len(held.records) == held.detach_at:
            held.records = {i: record.detached() for i, record in held.records.items()}
            held.detach_at = 0
        return record

    def _decode(self, ref: RecordRef) -> _Held | None:
        """Decodes the block of a record, and keeps those of its records that rows to come need."""
        shard, block, needed_index = ref
        self.needed.pop((shard, block), None)
        if (records := self._read((shard, block))) is None:
            return None
        needed = {i: r for i, r in enumerate(records) if i == needed_index or self.uses[shard, block, i] > 0}
        self.held[shard, block] = _Held(needed, len(records) // DETACHED_SHARE)
        return self.held[shard, block]

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

    def expect(self, rows: Sequence[Row]) -> None:
        """Announces rows that will be read behind those announced before. Their blocks may be read ahead."""
        for row in rows:
            self.parts[row.part].expect(row.records)
        for part in self.parts:
            part.reader.expect(list(part.needed))

    def read(self, row: Row) -> tuple[list[Record], int]:
        """Returns the undamaged records of a row, cut to what the settings read, and the number of damaged blocks.

        A block is counted with its first record, which is in one row of an epoch on one rank. Counts therefore add up
        over ranks and steps, from any cursor.
        """
        part, records, damaged = self.parts[row.part], list[Record](), 0
        self.latest_reader = part.reader
        for ref in row.records:
            record = part.take(ref)
            if record is None:
                damaged += ref[2] == 0
            else:
                records.append(part.shards.cut(record, part.vocab_size))
        if len(self.parts) > 1:
            records = [replace(record, name=f"{part.shards.path}:{record.name}") for record in records]
        return records, damaged
