"""Blocks of a cache in, records out, each block verified first.

    url of a tar → opened → the bytes of one block → verified → (member name, bytes) → one sample → decoded strictly

No byte is looked at before its block's hash is right.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from data.cache import webdataset_io
from data.cache.codec.block import decode_block
from data.cache.codec.coding import Coding
from data.cache.codec.header import Header
from data.cache.codec.rank_tables import RankTables
from data.cache.manifest import TABLES_FILE, Block, Manifest, Shard, parse_manifest, read_manifest
from data.cache.record import Record
from data.cache.storage import RangeReader, is_url, storage_at
from data.cache.tar import END_OF_TAR, read_members
from data.stream.order import BlockRef, RecordRef
from kd_core.errors import UsageError

MOST_MANIFEST = 1 << 28  # bytes


def _why(data: bytes, coding: Coding, url: str) -> str:
    """What is wrong with bytes whose hash is not the manifest's, as far as they tell."""
    try:
        names = [member.name for member in read_members(data)]
        decode_block(webdataset_io.read_block_members(data, url), coding)
    except Exception as error:  # anything may be in damaged bytes
        return str(error)
    return f"members {', '.join(names)} can be read, but are not those that the manifest was written for"


class DamagedError(UsageError):
    """A block is not what the manifest says."""


def manifest_at(path: str) -> Manifest:
    """Reads the manifest of a cache, wherever it lies.

    Raises:
        UsageError: it cannot be had, or is of another format or version.
    """
    if not is_url(path):
        return read_manifest(Path(path))
    storage = storage_at(path)
    url = storage.url("manifest.json")
    try:
        return parse_manifest(json.loads(storage.read("manifest.json", MOST_MANIFEST)), url)
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{url}: not valid JSON ({error}), wanted the manifest of a teacher cache.") from None


def read_tables(folder: Path | str, expected: dict[str, Any]) -> RankTables:
    """Reads the rank tables of a cache.

    Args:
        folder: the cache's folder or URL.
        expected: bytes and sha256 of the tables, as the manifest has them.

    Raises:
        UsageError: missing, or not those of the manifest.
    """
    storage = storage_at(folder)
    path, size = storage.url(TABLES_FILE), storage.size(TABLES_FILE)
    if size is not None and size != expected["bytes"]:
        raise UsageError(
            f"{path}: damaged: has {size} bytes, the manifest wants {expected['bytes']}. Restore it, or export again."
        )
    data = storage.read(TABLES_FILE, int(expected["bytes"]))
    digest = hashlib.sha256(data).hexdigest()
    try:
        members = {member.name: member.payload for member in read_members(data)}
        if digest != expected["sha256"]:
            raise ValueError(f"sha256 {digest[:12]}…, the manifest wants {str(expected['sha256'])[:12]}…")
        return RankTables.parse(members)
    except ValueError as error:
        raise UsageError(f"{path}: damaged: {error}. Restore it, or export the cache again.") from None


class ShardReader:
    """Reads blocks of one cache, each verified, and holds the decoded records of those in use.

    A remote shard stays open as long as a block of it is held, for the blocks after it; `close` ends that.
    """

    def __init__(self, folder: Path | str, manifest: Manifest) -> None:
        self.storage, self.manifest = storage_at(folder), manifest
        tables = read_tables(folder, manifest.tables)
        if tables.vocab_size != manifest.vocab_size:
            raise UsageError(
                f"{self.storage.url(TABLES_FILE)}: is of a vocabulary of {tables.vocab_size}, the manifest of "
                f"{manifest.vocab_size}. Restore it, or export the cache again."
            )
        self.coding = Coding(tables, manifest.selection, manifest.codec)
        self.held: dict[BlockRef, list[Record]] = {}
        self.open_shards: dict[int, RangeReader] = {}
        self.doing = "nothing was asked for"  # for who waits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all transfers; by the thread that reads."""
        self.keep_only(set())

    def stop(self) -> None:
        """End all transfers, from any thread; who reads gets an error."""
        for file in list(self.open_shards.values()):
            file.stop()

    def keep_only(self, blocks: set[BlockRef]) -> None:
        """Forget all blocks but these."""
        for ref in set(self.held) - blocks:
            del self.held[ref]
        for shard in set(self.open_shards) - {shard for shard, _ in blocks}:
            self.open_shards.pop(shard).close()

    def record(self, ref: RecordRef) -> Record:
        """One record."""
        shard, block, index = ref
        return self.block((shard, block))[index]

    def block(self, ref: BlockRef) -> list[Record]:
        """The records of a block, read where it is not held.

        Raises:
            DamagedError: it is not what the manifest says, down to the last bit.
            UsageError: it cannot be had.
        """
        if ref not in self.held:
            self.held[ref] = self._read(ref)
        return self.held[ref]

    def records(self) -> Iterator[Record]:
        """Every record in stored order, a block at a time."""
        with self:
            for index, shard in enumerate(self.manifest.shards):
                for block in range(len(shard.blocks)):
                    yield from self.block((index, block))
                    self.keep_only({(index, block)})

    def _read(self, ref: BlockRef) -> list[Record]:
        shard, index = self.manifest.shards[ref[0]], ref[1]
        block, path = shard.blocks[index], self.storage.url(shard.name)
        self.doing = f"{path}: block {index}"
        data = self._bytes(ref)
        data, end = data[: block.bytes], data[block.bytes :]
        if hashlib.sha256(data).hexdigest() != block.sha256:
            raise _damaged(path, index, _why(data, self.coding, path))
        if index == len(shard.blocks) - 1 and end != END_OF_TAR:
            raise _damaged(path, index, f"behind it wanted the {len(END_OF_TAR)} zeros that end a tar")
        try:
            records = decode_block(webdataset_io.read_block_members(data, path), self.coding)
        except Exception as error:  # what webdataset raises is not narrowed down
            raise _damaged(path, index, str(error)) from None
        if (found := tuple(record.positions for record in records)) != block.lengths:
            raise _damaged(path, index, f"holds records of {found} positions; the manifest wants {block.lengths}")
        return records

    def _bytes(self, ref: BlockRef) -> bytes:
        """The bytes of a block, and behind the last one those that end the shard."""
        shard, index = self.manifest.shards[ref[0]], ref[1]
        path, offset, size = self.storage.url(shard.name), offset_of(shard, index), shard.blocks[index].bytes
        size += len(END_OF_TAR) if index == len(shard.blocks) - 1 else 0
        stored = self.storage.size(shard.name)
        if stored is not None and stored != shard.bytes:
            raise _damaged(path, index, f"the shard has {stored} bytes; the manifest wants {shard.bytes}")
        if ref[0] not in self.open_shards:
            self.open_shards[ref[0]] = self.storage.open(shard.name)
        data = self.open_shards[ref[0]].read(offset, size)
        if len(data) < size:
            end = offset + len(data)
            raise _damaged(path, index, f"the shard ends after {end} bytes; the manifest wants {shard.bytes}")
        return data


def offset_of(shard: Shard, block: int) -> int:
    """Where a block begins."""
    return sum(each.bytes for each in shard.blocks[:block])


def _damaged(path: Path | str, block: int, why: str) -> DamagedError:
    return DamagedError(
        f"{path}: damaged: block {block}: {why}. Delete the shard and manifest.json and run the same export again."
    )


class WrittenBlock(NamedTuple):
    """A block of a shard that no manifest speaks of yet."""

    block: Block
    header: Header
    records: list[Record]


def read_written(path: Path, coding: Coding) -> Iterator[WrittenBlock]:
    """All blocks of a shard just written, and what the manifest is to say of them.

    Raises:
        UsageError: the shard is damaged.
    """
    data, index = path.read_bytes(), 0
    try:
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
