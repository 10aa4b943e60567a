"""Reader of a cache's blocks as records. Each block is verified first.

    expected blocks → reads under way → the bytes of one block → verified → members of one sample → decoded strictly

Records are decoded only after the hash of their block has matched the manifest. A block with another hash is parsed
only to describe the damage.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, NamedTuple, Self

from data.cache import webdataset_io
from data.cache.codec.block import decode_block
from data.cache.codec.coding import Coding
from data.cache.codec.header import Header
from data.cache.codec.rank_tables import RankTables
from data.cache.manifest import TABLES_FILE, Block, Manifest, Shard, parse_manifest, read_manifest
from data.cache.record import Record
from data.cache.storage import RETRY_SECONDS, is_url, storage_at
from data.cache.tar import END_OF_TAR, read_members
from data.stream.block_cache import BlockCache
from data.stream.order import BlockRef, RecordRef
from kd_core.errors import UsageError

MAX_MANIFEST_BYTES = 1 << 28


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


def load_manifest(path: str, retry_seconds: float = RETRY_SECONDS) -> Manifest:
    """Reads the manifest of a cache in a folder or behind a URL.

    Raises:
        UsageError: it cannot be read, or has another format or version.
    """
    if not is_url(path):
        return read_manifest(Path(path))
    storage = storage_at(path, retry_seconds)
    url = storage.url("manifest.json")
    try:
        return parse_manifest(json.loads(storage.read("manifest.json", MAX_MANIFEST_BYTES)), url)
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{url}: not valid JSON ({error}), wanted the manifest of a teacher cache.") from None


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
    verified blocks on this machine. `close` ends reads under way.
    """

    def __init__(
        self, folder: Path | str, manifest: Manifest, retry_seconds: float = RETRY_SECONDS,
        block_cache: BlockCache | None = None,
    ) -> None:  # fmt: skip
        self.storage, self.manifest = storage_at(folder, retry_seconds), manifest
        tables = read_tables(folder, manifest.tables, retry_seconds)
        if tables.vocab_size != manifest.vocab_size:
            raise UsageError(
                f"{self.storage.url(TABLES_FILE)}: has a vocabulary of {tables.vocab_size}, the manifest one of "
                f"{manifest.vocab_size}. Restore it, or export the cache again."
            )
        self.coding = Coding(tables, manifest.selection, manifest.codec)
        self.held: dict[BlockRef, list[Record]] = {}
        self.block_cache = block_cache if self.storage.read_ahead else None
        self.expected: dict[BlockRef, int] = {}  # bytes to read, in the order in which they will be needed
        self.reads: dict[BlockRef, Future[bytes]] = {}  # under way, or done and not yet used
        self.stopped = False
        self.current_block = "nothing was asked for"  # shown in errors of the thread that waits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all reads and drops all records. Only the reading thread may call it."""
        for read in self.reads.values():
            read.cancel()
        self.reads.clear()
        self.expected.clear()
        self.held.clear()

    def stop(self) -> None:
        """Ends all reads. Any thread may call it, and the reading thread gets an error."""
        self.stopped = True
        for read in list(self.reads.values()):
            read.cancel()

    def keep_only(self, blocks: set[BlockRef]) -> None:
        """Drops the records of all other blocks."""
        for ref in set(self.held) - blocks:
            del self.held[ref]

    @property
    def has_room(self) -> bool:
        """Returns True if further blocks may be expected."""
        return sum(self.expected.values()) < self.storage.read_ahead

    def expect(self, blocks: Iterable[BlockRef]) -> None:
        """States further blocks that will be needed, in that order. They are read ahead, up to `read_ahead` bytes."""
        for ref in blocks:
            if self.storage.read_ahead and ref not in self.held and ref not in self.expected:
                self.expected[ref] = self._size(ref)
        self._read_ahead()

    def _read_ahead(self) -> None:
        room = self.storage.read_ahead
        for ref, size in self.expected.items():
            room -= size
            if room < 0 or self.stopped:
                return
            if ref not in self.reads and not (self.block_cache and self.block_cache.has(self._block(ref).sha256)):
                self._start_read(ref)

    def _block(self, ref: BlockRef) -> Block:
        return self.manifest.shards[ref[0]].blocks[ref[1]]

    def _start_read(self, ref: BlockRef) -> "Future[bytes]":
        if ref not in self.reads:
            shard = self.manifest.shards[ref[0]]
            self.reads[ref] = self.storage.start_read(shard.name, block_offset(shard, ref[1]), self._size(ref))
        return self.reads[ref]

    def _size(self, ref: BlockRef) -> int:
        """Returns how many bytes to read. Behind the last block they include the end of the tar, and one byte more."""
        blocks = self.manifest.shards[ref[0]].blocks
        return blocks[ref[1]].bytes + (len(END_OF_TAR) + 1 if ref[1] == len(blocks) - 1 else 0)

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
                for block in range(len(shard.blocks)):
                    yield from self.block((index, block))
                    self.keep_only({(index, block)})

    def _read(self, ref: BlockRef) -> list[Record]:
        shard, index = self.manifest.shards[ref[0]], ref[1]
        block, path = shard.blocks[index], self.storage.url(shard.name)
        self.current_block = f"{path}: block {index}"
        data = self._verified_bytes(ref, path)
        try:
            records = decode_block(webdataset_io.read_block_members(data, path), self.coding)
        except Exception as error:  # whatever webdataset raises means damage
            raise _damaged(path, index, str(error)) from None
        if (lengths := tuple(record.positions for record in records)) != block.lengths:
            raise _damaged(path, index, f"holds records of {lengths} positions; the manifest says {block.lengths}")
        return records

    def _verified_bytes(self, ref: BlockRef, path: str) -> bytes:
        """Returns the bytes of a block, from this machine if they are kept there, else from the storage.

        Raises:
            DamagedBlockError: the storage holds other bytes than the manifest says.
        """
        block, kept = self._block(ref), self.block_cache
        if kept and ref not in self.reads and (data := kept.get(block.sha256, block.bytes)) is not None:
            if hashlib.sha256(data).hexdigest() == block.sha256:
                self._used(ref)
                return data
            kept.drop(block.sha256)
        data = self._bytes(ref)
        data, end = data[: block.bytes], data[block.bytes :]
        if hashlib.sha256(data).hexdigest() != block.sha256:
            raise _damaged(path, ref[1], _damage_cause(data, self.coding, path))
        if end and end != END_OF_TAR:
            raise _damaged(path, ref[1], f"behind it wanted the {len(END_OF_TAR)} zeros that end a tar")
        if kept:
            kept.put(block.sha256, data)
        return data

    def _used(self, ref: BlockRef) -> None:
        """Forgets a block that was expected, which makes room for reading others ahead."""
        self.expected.pop(ref, None)
        self._read_ahead()

    def _bytes(self, ref: BlockRef) -> bytes:
        """Returns the bytes of a block. The last block's are followed by those that end the tar.

        Raises:
            DamagedBlockError: the shard has another size than the manifest says.
            UsageError: they cannot be read, or the reader was stopped.
        """
        read = self._start_read(ref)
        if self.stopped:
            read.cancel()
        try:
            data = read.result()
        except CancelledError:
            raise UsageError(f"{self.current_block}: reading was stopped.") from None
        finally:
            read.cancel()  # after an interrupt
            self.reads.pop(ref, None)
        self._used(ref)
        shard, is_last = self.manifest.shards[ref[0]], ref[1] == len(self.manifest.shards[ref[0]].blocks) - 1
        if len(data) != self._size(ref) - is_last:
            stored = self.storage.size(shard.name)
            raise _damaged(
                self.storage.url(shard.name), ref[1], f"the shard has {stored} bytes; the manifest says {shard.bytes}"
            )
        return data


def block_offset(shard: Shard, block: int) -> int:
    """Returns the byte at which a block begins in its shard."""
    return sum(earlier.bytes for earlier in shard.blocks[:block])


def _damaged(path: Path | str, block: int, cause: str) -> DamagedBlockError:
    return DamagedBlockError(
        f"{path}: damaged: block {block}: {cause}. Delete the shard and manifest.json and run the same export again."
    )


class WrittenBlock(NamedTuple):
    """A block of a shard that is not yet in a manifest."""

    block: Block
    header: Header
    records: list[Record]


def read_written_blocks(path: Path, coding: Coding) -> Iterator[WrittenBlock]:
    """Yields the blocks of a shard that was just written, each with its manifest entry, header and records.

    Raises:
        UsageError: the shard is damaged.
    """
    data, index = path.read_bytes(), 0
    try:
        # Members of a block share a name up to the first dot. Of each block, the offset of its first member remains.
        starts = {member.name.partition(".")[0]: member.offset for member in reversed(list(read_members(data)))}
        edges = [*sorted(starts.values()), len(data) - len(END_OF_TAR)]
        for start, end in itertools.pairwise(edges):
            members = webdataset_io.read_block_members(data[start:end], str(path))
            records = decode_block(members, coding)
            lengths = tuple(record.positions for record in records)
            digest = hashlib.sha256(data[start:end]).hexdigest()
            yield WrittenBlock(Block(end - start, digest, lengths), Header.parse(members["json"]), records)
            index += 1
    except ValueError as error:
        raise _damaged(path, index, str(error)) from None
