"""Blocks of a cache in, records out, through webdataset's opener, expander and grouper. The one module that knows it.

    url of a tar → opened → the bytes of one block → verified → (member name, bytes) → one sample → decoded strictly

No byte is looked at before its block's hash is right. `pipe:` and the like never reach webdataset, and none of its
decoders is used: members stay bytes until ours.
"""

import hashlib
import io
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.cache.codec.block import decode_block
from data.cache.codec.coding import Coding
from data.cache.codec.header import Header
from data.cache.codec.tables import Tables
from data.cache.manifest import TABLES, Block, Manifest, Shard
from data.cache.record import Record
from data.cache.tar import END, read_members
from data.stream.order import BlockRef, RecordRef
from kd_core.errors import UsageError


def _reraise(error: Exception) -> bool:
    raise error


def _sample(data: bytes, url: str) -> dict[str, Any]:
    """The one sample of a block's bytes, by webdataset."""
    sources = [{"url": url, "stream": io.BytesIO(data + END)}]
    samples = list(group_by_keys(tar_file_expander(sources, handler=_reraise), handler=_reraise))
    if len(samples) != 1:
        raise ValueError(f"holds {len(samples)} samples, wanted 1")
    return samples[0]


def _members(data: bytes, url: str) -> dict[str, bytes]:
    """Members of a block by suffix."""
    names = [member.name for member in read_members(data)]  # refuses all but plain files first
    if len(set(names)) != len(names):
        raise ValueError(f"has a member twice: {sorted(names)}")
    sample = _sample(data, url)
    return {suffix: payload for suffix, payload in sample.items() if not suffix.startswith("__")}


def _why(data: bytes, coding: Coding, url: str) -> str:
    """What is wrong with bytes whose hash is not the manifest's, as far as they tell."""
    try:
        names = [member.name for member in read_members(data)]
        decode_block(_members(data, url), coding)
    except Exception as error:  # anything may be in damaged bytes
        return str(error)
    return f"members {', '.join(names)} can be read, but are not those that the manifest was written for"


def read_tables(folder: Path, wanted: dict[str, Any]) -> Tables:
    """The tables of a cache.

    Raises:
        UsageError: missing, or not those of the manifest.
    """
    path = folder / TABLES
    if not path.is_file():
        raise UsageError(f"{path}: no such file; the manifest wants it. Restore it, or export the cache again.")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    try:
        members = {member.name: member.payload for member in read_members(data)}
        if found != wanted["sha256"]:
            raise ValueError(f"sha256 {found[:12]}…, the manifest wants {str(wanted['sha256'])[:12]}…")
        return Tables.of_members(members)
    except ValueError as error:
        raise UsageError(f"{path}: damaged: {error}. Restore it, or export the cache again.") from None


class ShardReader:
    """Reads blocks of one cache, each verified, and holds the decoded records of those in use."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        tables = read_tables(folder, manifest.tables)
        self.coding = Coding(tables, manifest.selection, manifest.codec)
        self.held: dict[BlockRef, list[Record]] = {}

    def keep_only(self, blocks: set[BlockRef]) -> None:
        """Forget all blocks but these."""
        for ref in set(self.held) - blocks:
            del self.held[ref]

    def record(self, ref: RecordRef) -> Record:
        """One record."""
        shard, block, index = ref
        return self.block((shard, block))[index]

    def block(self, ref: BlockRef) -> list[Record]:
        """The records of a block, read where it is not held.

        Raises:
            UsageError: it is not what the manifest says, down to the last bit.
        """
        if ref not in self.held:
            self.held[ref] = self._read(ref)
        return self.held[ref]

    def records(self) -> Iterator[Record]:
        """Every record in stored order, a block at a time."""
        for index, shard in enumerate(self.manifest.shards):
            for block in range(len(shard.blocks)):
                yield from self.block((index, block))
                self.keep_only({(index, block)})

    def _read(self, ref: BlockRef) -> list[Record]:
        shard = self.manifest.shards[ref[0]]
        block, path = shard.blocks[ref[1]], self.folder / shard.name
        data = self._bytes(shard, ref[1])
        if hashlib.sha256(data).hexdigest() != block.sha256:
            raise _damaged(path, ref[1], _why(data, self.coding, str(path)))
        try:
            records = decode_block(_members(data, str(path)), self.coding)
        except Exception as error:  # what webdataset raises is not narrowed down
            raise _damaged(path, ref[1], str(error)) from None
        if (found := tuple(record.positions for record in records)) != block.lengths:
            raise _damaged(path, ref[1], f"holds records of {found} positions; the manifest wants {block.lengths}")
        return records

    def _bytes(self, shard: Shard, block: int) -> bytes:
        """The bytes of a block."""
        path = self.folder / shard.name
        if not path.is_file():
            raise UsageError(f"{path}: no such shard; the manifest wants it. Run the same export again to restore it.")
        if path.stat().st_size != shard.bytes:
            raise _damaged(path, block, f"the shard has {path.stat().st_size} bytes; the manifest wants {shard.bytes}")
        opened: Any = gopen(str(path.absolute()))
        with closing(opened) as stream:
            stream.seek(offset_of(shard, block))
            return stream.read(shard.blocks[block].bytes)


def offset_of(shard: Shard, block: int) -> int:
    """Where a block begins."""
    return sum(each.bytes for each in shard.blocks[:block])


def _damaged(path: Path, block: int, why: str) -> UsageError:
    return UsageError(
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
            members = _members(data[start:end], str(path))
            records = decode_block(members, coding)
            lengths = tuple(record.positions for record in records)
            digest = hashlib.sha256(data[start:end]).hexdigest()
            yield WrittenBlock(Block(end - start, digest, lengths), Header.of(members["json"]), records)
            index += 1
    except ValueError as error:
        raise _damaged(path, index, str(error)) from None
