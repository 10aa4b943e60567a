"""Reader of a cache's blocks as records. Each block is verified first.

    expected blocks → reads under way → the bytes of one block → verified → members of one sample → decoded strictly

Records are decoded only after the hash of their block has matched the manifest. A block with another hash is parsed
only to describe the damage.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from data.cache import webdataset_io
from data.cache.codec.block import decode_block
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import RankTables
from data.cache.manifest import TABLES_FILE, Manifest
from data.cache.record import Record
from data.cache.tar import read_members
from data.storage.storage import RETRY_SECONDS, storage_at
from data.stream.block_cache import BlockCache
from data.stream.block_reader import BlockReader, damaged
from data.stream.order import BlockRef, RecordRef
from kd_core.errors import UsageError


def read_tables(folder: Path | str, expected: dict[str, Any], retry_seconds: float = RETRY_SECONDS) -> RankTables:
    """Reads the rank tables of a cache.

    Args:
        folder: the cache's folder or URL.
        expected: `bytes` and `sha256` of the tables, as the manifest states them.
        retry_seconds: seconds in which a failed read from a URL is tried again.

    Raises:
        UsageError: the tables are missing, or differ from what the manifest states.
    """
    storage = storage_at(folder, retry_seconds)
    path = storage.url(TABLES_FILE)
    data = storage.read(TABLES_FILE, int(expected["bytes"]))
    digest = hashlib.sha256(data).hexdigest()
    try:
        members = {member.name: member.payload for member in read_members(data)}
        if digest != expected["sha256"]:
            raise ValueError(f"sha256 {digest[:12]}…, the manifest says {str(expected['sha256'])[:12]}…")
        return RankTables.parse(members)
    except ValueError as error:
        raise UsageError(f"{path}: damaged: {error}. Restore it, or export the cache again.") from None


class ShardReader:
    """A reader of one cache's blocks. It verifies each block, and holds the decoded records of those in use.

    Where the storage is far away, blocks that `expect` names are read ahead of their use, and `block_cache` keeps
    verified blocks on this machine. `close` ends reads under way. Without `tables`, those of the cache are read.
    """

    def __init__(
        self, folder: Path | str, manifest: Manifest, retry_seconds: float = RETRY_SECONDS,
        block_cache: BlockCache | None = None, tables: RankTables | None = None,
    ) -> None:  # fmt: skip
        self.storage, self.manifest = storage_at(folder, retry_seconds), manifest
        tables = tables or read_tables(folder, manifest.tables, retry_seconds)
        if tables.vocab_size != manifest.vocab_size:
            raise UsageError(
                f"{self.storage.url(TABLES_FILE)}: has a vocabulary of {tables.vocab_size}, the manifest one of "
                f"{manifest.vocab_size}. Restore it, or export the cache again."
            )
        self.coding = Coding(tables, manifest.selection, manifest.codec)
        self.held: dict[BlockRef, list[Record]] = {}
        self.blocks = BlockReader(self.storage, manifest, self.coding, block_cache)
        self.current_block = "nothing was asked for"  # shown in errors of the thread that waits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all reads and drops all records. Only the reading thread may call it."""
        self.blocks.close()
        self.held.clear()

    def stop(self) -> None:
        """Ends all reads. Any thread may call it, and the reading thread gets an error."""
        self.blocks.stop()

    def keep_only(self, blocks: set[BlockRef]) -> None:
        """Drops the records of all other blocks."""
        for ref in set(self.held) - blocks:
            del self.held[ref]

    @property
    def has_room(self) -> bool:
        """Returns True if further blocks may be expected."""
        return self.blocks.has_room

    def expect(self, blocks: Iterable[BlockRef]) -> None:
        """States further blocks that will be needed, in that order, if they are not held. They are read ahead."""
        self.blocks.expect(ref for ref in blocks if ref not in self.held)

    def record(self, ref: RecordRef) -> Record:
        shard, block, index = ref
        return self.block((shard, block))[index]

    def block(self, ref: BlockRef) -> list[Record]:
        """Returns the records of a block, and reads the block if it is not held.

        Raises:
            DamagedBlockError: the block is not what the manifest says, down to the last bit.
            UsageError: the block cannot be read.
        """
        if ref not in self.held:
            self.held[ref] = self._read(ref)
        return self.held[ref]

    def records(self) -> Iterator[Record]:
        """Yields every record in stored order, with one block in memory at a time."""
        with self:
            for index, shard in enumerate(self.manifest.shards):
                self.blocks.expect((index, block) for block in range(shard.blocks))
                for block in range(shard.blocks):
                    yield from self.block((index, block))
                    self.keep_only({(index, block)})

    def _read(self, ref: BlockRef) -> list[Record]:
        shard, index = self.manifest.shards[ref[0]], ref[1]
        block, path = self.manifest.block(*ref), self.storage.url(shard.name)
        self.current_block = f"{path}: block {index}"
        data = self.blocks.read(ref)
        try:
            records = decode_block(webdataset_io.read_block_members(data, path), self.coding)
        except Exception as error:  # whatever webdataset raises means damage
            raise damaged(path, index, str(error)) from None
        if (lengths := tuple(record.positions for record in records)) != block.lengths:
            raise damaged(path, index, f"holds records of {lengths} positions; the manifest says {block.lengths}")
        return records
