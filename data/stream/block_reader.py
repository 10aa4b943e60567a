"""Reader of the bytes of a cache's blocks: ahead of their use, and verified by the manifest's hashes.

expected blocks ─► reads under way ─► bytes ─► verified ─► kept on this machine
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

from data.cache import webdataset_io
from data.cache.codec.block import decode_block
from data.cache.codec.coding import Coding
from data.cache.manifest import Block, Manifest
from data.cache.tar import END_OF_TAR, read_members
from data.storage.storage import Storage
from data.stream.block_cache import BlockCache
from data.stream.order import BlockRef
from kd_core.errors import UsageError


class DamagedBlockError(UsageError):
    """Error of a block that differs from what the manifest says of it."""


def damaged(path: Path | str, block: int, cause: str) -> DamagedBlockError:
    """Returns the error of a block."""
    return DamagedBlockError(
        f"{path}: damaged: block {block}: {cause}. Restore the shard, or delete it and manifest.json and"
        " run the same export again."
    )


def _damage_cause(data: bytes, coding: Coding, url: str) -> str:
    """Returns what is wrong with bytes whose hash is not the manifest's, as far as decoding them shows it."""
    try:
        names = [member.name for member in read_members(data)]
        decode_block(webdataset_io.read_block_members(data, url), coding)
    except Exception as error:  # damaged bytes may raise anything
        return str(error)
    return f"members {', '.join(names)} can be read, but are not those that the manifest was written for"


class BlockReader:
    """A reader of the bytes of one cache's blocks.

    Where the storage is far away, blocks that `expect` names are read ahead of their use, and `block_cache` keeps
    verified blocks on this machine. `close` ends reads under way.
    """

    def __init__(self, storage: Storage, manifest: Manifest, coding: Coding, block_cache: BlockCache | None) -> None:
        self.storage, self.manifest, self.coding = storage, manifest, coding
        self.block_cache = block_cache if storage.read_ahead else None
        self.expected: dict[BlockRef, int] = {}  # bytes to read, in the order in which they will be needed
        self.waiting: dict[BlockRef, int] = {}  # those of them for which nothing was done yet
        self.bytes_ahead = 0  # of the other ones
        self.reads: dict[BlockRef, Future[bytes]] = {}  # under way, or done and not yet used
        self.stopped = False
        self._writer: ThreadPoolExecutor | None = None  # of the last block that is kept on this machine
        self._written: Future[None] | None = None

    def close(self) -> None:
        """Ends all reads. Only the reading thread may call it."""
        if self._writer:
            self._writer.shutdown()
            self._writer = None
        for read in self.reads.values():
            read.cancel()
        self.reads.clear()
        self.expected.clear()
        self.waiting.clear()
        self.bytes_ahead = 0

    def stop(self) -> None:
        """Ends all reads. Any thread may call it, and the reading thread gets an error."""
        self.stopped = True
        for read in list(self.reads.values()):
            read.cancel()

    @property
    def has_room(self) -> bool:
        """Returns True if further blocks may be expected."""
        return sum(self.expected.values()) < self.storage.read_ahead

    def expect(self, blocks: Iterable[BlockRef]) -> None:
        """States further blocks that will be needed, in that order. They are read ahead, up to `read_ahead` bytes."""
        for ref in blocks:
            if self.storage.read_ahead and ref not in self.expected:
                self.expected[ref] = self.waiting[ref] = self._size(ref)
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Starts reads of waiting blocks that are not on this machine, as far as `read_ahead` bytes go."""
        while self.waiting and not self.stopped:
            ref, size = next(iter(self.waiting.items()))
            if self.bytes_ahead + size > self.storage.read_ahead:
                return
            del self.waiting[ref]
            self.bytes_ahead += size
            if not (self.block_cache and self.block_cache.has(self._block(ref).sha256)):
                self._start_read(ref)

    def _block(self, ref: BlockRef) -> Block:
        return self.manifest.block(*ref)

    def _path(self, ref: BlockRef) -> str:
        return self.storage.url(self.manifest.shards[ref[0]].name)

    def _start_read(self, ref: BlockRef) -> "Future[bytes]":
        if ref not in self.reads:
            shard = self.manifest.shards[ref[0]]
            self.reads[ref] = self.storage.start_read(shard.name, self._block(ref).offset, self._size(ref))
        return self.reads[ref]

    def _size(self, ref: BlockRef) -> int:
        """Returns how many bytes to read. Behind the last block they include the end of the tar, and one byte more."""
        index = self.manifest.index(ref[0])
        return int(index.block_bytes[ref[1]]) + (len(END_OF_TAR) + 1 if ref[1] == len(index) - 1 else 0)

    def read(self, ref: BlockRef) -> bytes:
        """Returns the verified bytes of a block, from this machine if they are kept there, else from the storage.

        Raises:
            DamagedBlockError: the storage holds other bytes than the manifest says.
            UsageError: they cannot be read, or the reader was stopped.
        """
        block, block_cache, path = self._block(ref), self.block_cache, self._path(ref)
        if block_cache and ref not in self.reads and (data := block_cache.get(block.sha256, block.bytes)) is not None:
            if hashlib.sha256(data).hexdigest() == block.sha256:
                self._used(ref)
                return data
            block_cache.drop(block.sha256)
        data = self._bytes(ref)
        data, end = data[: block.bytes], data[block.bytes :]
        if hashlib.sha256(data).hexdigest() != block.sha256:
            raise damaged(path, ref[1], _damage_cause(data, self.coding, path))
        if end and end != END_OF_TAR:
            raise damaged(path, ref[1], f"behind it wanted the {len(END_OF_TAR)} zeros that end a tar")
        if block_cache:
            self._keep(block_cache, block.sha256, data)
        return data

    def _keep(self, block_cache: BlockCache, sha256: str, data: bytes) -> None:
        """Writes a verified block to this machine's disk while reading goes on. One at a time is written."""
        if self._written:
            self._written.result()
        self._writer = self._writer or ThreadPoolExecutor(1, "block cache")
        self._written = self._writer.submit(block_cache.put, sha256, data)

    def _used(self, ref: BlockRef) -> None:
        """Forgets a block that was expected, which makes room for reading others ahead."""
        size = self.expected.pop(ref, 0)
        if self.waiting.pop(ref, None) is None:
            self.bytes_ahead -= size
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
            raise UsageError(f"{self._path(ref)}: block {ref[1]}: reading was stopped.") from None
        finally:
            read.cancel()  # after an interrupt
            self.reads.pop(ref, None)
        self._used(ref)
        shard = self.manifest.shards[ref[0]]
        if len(data) != self._size(ref) - (ref[1] == shard.blocks - 1):
            stored = self.storage.size(shard.name)
            raise damaged(self._path(ref), ref[1], f"the shard has {stored} bytes; the manifest says {shard.bytes}")
        return data
