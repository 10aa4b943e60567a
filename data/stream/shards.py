"""Blocks of a cache in, records out, each block verified first.

    url of a tar → opened → the bytes of one block → verified → (member name, bytes) → one sample → decoded strictly

No byte is looked at before its block's hash is right.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Self

from data.cache.codec.block import decode_block
from data.cache.codec.coding import Coding
from data.cache.codec.header import Header
from data.cache.codec.rank_tables import Tables
from data.cache.manifest import TABLES, Block, Manifest, Shard, parse_manifest, read_manifest
from data.cache.record import Record
from data.cache.tar import END, read_members
from data.stream import webdataset_io
from data.stream.location import Location, RemoteFile
from data.stream.order import BlockRef, RecordRef
from kd_core.errors import UsageError

MOST_MANIFEST = 1 << 28  # bytes


def _why(data: bytes, coding: Coding, url: str) -> str:
    """What is wrong with bytes whose hash is not the manifest's, as far as they tell."""
    try:
        names = [member.name for member in read_members(data)]
        decode_block(webdataset_io.members_of(data, url), coding)
    except Exception as error:  # anything may be in damaged bytes
        return str(error)
    return f"members {', '.join(names)} can be read, but are not those that the manifest was written for"


class DamagedError(UsageError):
    """A block is not what the manifest says."""


def manifest_at(location: Location) -> Manifest:
    """The manifest of a cache, wherever it lies.

    Raises:
        UsageError: it cannot be had, or is of another format or version.
    """
    if not location.remote:
        return read_manifest(location.folder)
    url = location.of("manifest.json")
    try:
        return parse_manifest(json.loads(location.read("manifest.json", MOST_MANIFEST)), url)
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{url}: not valid JSON ({error}), wanted the manifest of a teacher cache.") from None


def read_tables(folder: Path | str, wanted: dict[str, Any]) -> Tables:
    """The tables of a cache.

    Raises:
        UsageError: missing, or not those of the manifest.
    """
    location = Location(str(folder))
    path = location.of(TABLES)
    if not location.remote and not Path(path).is_file():
        raise UsageError(f"{path}: no such file; the manifest wants it. Restore it, or export the cache again.")
    if not location.remote and (size := Path(path).stat().st_size) != wanted["bytes"]:
        raise UsageError(
            f"{path}: damaged: has {size} bytes, the manifest wants {wanted['bytes']}. Restore it, or export again."
        )
    data = location.read(TABLES, int(wanted["bytes"])) if location.remote else Path(path).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    try:
        members = {member.name: member.payload for member in read_members(data)}
        if found != wanted["sha256"]:
            raise ValueError(f"sha256 {found[:12]}…, the manifest wants {str(wanted['sha256'])[:12]}…")
        return Tables.of_members(members)
    except ValueError as error:
        raise UsageError(f"{path}: damaged: {error}. Restore it, or export the cache again.") from None


class ShardReader:
    """Reads blocks of one cache, each verified, and holds the decoded records of those in use.

    A remote shard stays open as long as a block of it is held, for the blocks after it; `close` ends that.
    """

    def __init__(self, folder: Path | str, manifest: Manifest) -> None:
        self.location, self.manifest = Location(str(folder)), manifest
        tables = read_tables(folder, manifest.tables)
        if tables.vocab_size != manifest.vocab_size:
            raise UsageError(
                f"{self.location.of(TABLES)}: is of a vocabulary of {tables.vocab_size}, the manifest of "
                f"{manifest.vocab_size}. Restore it, or export the cache again."
            )
        self.coding = Coding(tables, manifest.selection, manifest.codec)
        self.held: dict[BlockRef, list[Record]] = {}
        self.transfers: dict[int, RemoteFile] = {}
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
        for transfer in list(self.transfers.values()):
            transfer.stop()

    def keep_only(self, blocks: set[BlockRef]) -> None:
        """Forget all blocks but these."""
        for ref in set(self.held) - blocks:
            del self.held[ref]
        for shard in set(self.transfers) - {shard for shard, _ in blocks}:
            self.transfers.pop(shard).close()

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
        block, path = shard.blocks[index], self.location.of(shard.name)
        self.doing = f"{path}: block {index}"
        data = self._bytes(ref)
        data, end = data[: block.bytes], data[block.bytes :]
        if hashlib.sha256(data).hexdigest() != block.sha256:
            raise _damaged(path, index, _why(data, self.coding, path))
        if index == len(shard.blocks) - 1 and end != END:
            raise _damaged(path, index, f"behind it wanted the {len(END)} zeros that end a tar")
        try:
            records = decode_block(webdataset_io.members_of(data, path), self.coding)
        except Exception as error:  # what webdataset raises is not narrowed down
            raise _damaged(path, index, str(error)) from None
        if (found := tuple(record.positions for record in records)) != block.lengths:
            raise _damaged(path, index, f"holds records of {found} positions; the manifest wants {block.lengths}")
        return records

    def _bytes(self, ref: BlockRef) -> bytes:
        """The bytes of a block, and behind the last one those that end the shard."""
        shard, index = self.manifest.shards[ref[0]], ref[1]
        path, offset, size = self.location.of(shard.name), offset_of(shard, index), shard.blocks[index].bytes
        size += len(END) if index == len(shard.blocks) - 1 else 0
        if self.location.remote:
            transfer = self.transfers.setdefault(ref[0], RemoteFile(path))
            data = transfer.read(offset, size)
            if len(data) < size:
                raise _damaged(
                    path, index, f"the shard ends after {transfer.at} bytes; the manifest wants {shard.bytes}"
                )
            return data
        local = Path(path)
        if not local.is_file():
            raise UsageError(f"{path}: no such shard; the manifest wants it. Run the same export again to restore it.")
        if (found := local.stat().st_size) != shard.bytes:
            raise _damaged(path, index, f"the shard has {found} bytes; the manifest wants {shard.bytes}")
        with closing(webdataset_io.opened(str(local.absolute()))) as stream:
            stream.seek(offset)
            return stream.read(size)


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
        edges = [*sorted(starts.values()), len(data) - len(END)]
        for start, end in itertools.pairwise(edges):
            members = webdataset_io.members_of(data[start:end], str(path))
            records = decode_block(members, coding)
            lengths = tuple(record.positions for record in records)
            digest = hashlib.sha256(data[start:end]).hexdigest()
            yield WrittenBlock(Block(end - start, digest, lengths), Header.of(members["json"]), records)
            index += 1
    except ValueError as error:
        raise _damaged(path, index, str(error)) from None
