"""Reader of a cache's blocks as records. Each block is verified first.

    url of a tar → opened → the bytes of one block → verified → (member name, bytes) → one sample → decoded strictly

Records are decoded only after the hash of their block has matched the manifest. A block with another hash is parsed
only to describe the damage.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from data.cache import webdataset_io
from data.cache.codec.block import decode_block
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import RankTables
from data.cache.manifest import TABLES_FILE, Block, Manifest
from data.cache.record import Record
from data.cache.storage import RangeReader, storage_at
from data.cache.tar import END_OF_TAR, read_members
from data.stream.order import BlockRef, RecordRef
from kd_core.errors import UsageError


def _damage_cause(data: bytes, coding: Coding, url: str) -> str:
    """Returns what is wrong with bytes whose hash is not the manifest's, as far as decoding them shows it."""
    try:
        names = [member.name for member in read_members(data)]
        decode_block(webdataset_io.read_block_members(data, url), coding)
    except Exception as error:  # damaged bytes may raise anything
        return str(error)
    return f"members {', '.join(names)} can be read, but are not those that the manifest was written for"


class DamagedBlockError(UsageError):
    """Error of a block that differs from what the manifest says of it."""


def read_tables(folder: Path | str, expected: dict[str, Any]) -> RankTables:
    """Reads the rank tables of a cache.

    Args:
        folder: the cache's folder or URL.
        expected: `bytes` and `sha256` of the tables, as the manifest states them.

    Raises:
        UsageError: the tables are missing, or differ from what the manifest states.
    """
    storage = storage_at(folder)
    path, size = storage.url(TABLES_FILE), storage.size(TABLES_FILE)
    if size is not None and size != expected["bytes"]:
        raise UsageError(
            f"{path}: damaged: has {size} bytes, the manifest says {expected['bytes']}. Restore it, or export again."
        )
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

    A remote shard stays open while a block of it is held, because later blocks are read from the same transfer.
    `close` ends it.
    """

    def __init__(self, folder: Path | str, manifest: Manifest) -> None:
        self.storage, self.manifest = storage_at(folder), manifest
        tables = read_tables(folder, manifest.tables)
        if tables.vocab_size != manifest.vocab_size:
            raise UsageError(
                f"{self.storage.url(TABLES_FILE)}: has a vocabulary of {tables.vocab_size}, the manifest one of "
                f"{manifest.vocab_size}. Restore it, or export the cache again."
            )
        self.coding = Coding(tables, manifest.selection, manifest.codec)
        self.held: dict[BlockRef, list[Record]] = {}
        self.open_shards: dict[int, RangeReader] = {}
        self.current_block = "nothing was asked for"  # shown in errors of the thread that waits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all transfers. Only the reading thread may call it."""
        self.keep_only(set())

    def stop(self) -> None:
        """Ends all transfers. Any thread may call it, and the reading thread gets an error."""
        for file in list(self.open_shards.values()):
            file.stop()

    def keep_only(self, blocks: set[BlockRef]) -> None:
        """Drops the records of all other blocks, and closes shards without a held block."""
        for ref in set(self.held) - blocks:
            del self.held[ref]
        for shard in set(self.open_shards) - {shard for shard, _ in blocks}:
            self.open_shards.pop(shard).close()

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
                for block in range(shard.blocks):
                    yield from self.block((index, block))
                    self.keep_only({(index, block)})

    def _read(self, ref: BlockRef) -> list[Record]:
        shard, index = self.manifest.shards[ref[0]], ref[1]
        block, path = self.manifest.block(*ref), self.storage.url(shard.name)
        self.current_block = f"{path}: block {index}"
        data = self._bytes(ref, block)
        data, end = data[: block.bytes], data[block.bytes :]
        if hashlib.sha256(data).hexdigest() != block.sha256:
            raise _damaged(path, index, _damage_cause(data, self.coding, path))
        if index == shard.blocks - 1 and end != END_OF_TAR:
            raise _damaged(path, index, f"behind it wanted the {len(END_OF_TAR)} zeros that end a tar")
        try:
            records = decode_block(webdataset_io.read_block_members(data, path), self.coding)
        except Exception as error:  # whatever webdataset raises means damage
            raise _damaged(path, index, str(error)) from None
        if (lengths := tuple(record.positions for record in records)) != block.lengths:
            raise _damaged(path, index, f"holds records of {lengths} positions; the manifest says {block.lengths}")
        return records

    def _bytes(self, ref: BlockRef, block: Block) -> bytes:
        """Returns the bytes of a block. The last block's are followed by those that end the tar."""
        shard, index = self.manifest.shards[ref[0]], ref[1]
        path, size = self.storage.url(shard.name), block.bytes
        size += len(END_OF_TAR) if index == shard.blocks - 1 else 0
        stored = self.storage.size(shard.name)
        if stored is not None and stored != shard.bytes:
            raise _damaged(path, index, f"the shard has {stored} bytes; the manifest says {shard.bytes}")
        if ref[0] not in self.open_shards:
            self.open_shards[ref[0]] = self.storage.open(shard.name)
        data = self.open_shards[ref[0]].read(block.offset, size)
        if len(data) < size:
            end = block.offset + len(data)
            raise _damaged(path, index, f"the shard ends after {end} bytes; the manifest says {shard.bytes}")
        return data


def _damaged(path: Path | str, block: int, cause: str) -> DamagedBlockError:
    return DamagedBlockError(
        f"{path}: damaged: block {block}: {cause}. Delete the shard and manifest.json and run the same export again."
    )
