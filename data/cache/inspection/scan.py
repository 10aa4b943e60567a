"""A scan of every byte of a cache, in stored order and block by block, which reports problems instead of raising.

    tables.tar → size → hash → members → tables
    shard      → size → each block: hash → members → records → end of tar → hash of the shard

Training reads through `data/stream` instead. This reader is independent of it: it does without webdataset, and skips
nothing.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.cache.codec.block import decode_block
from data.cache.codec.coding import Coding
from data.cache.codec.header import Header
from data.cache.codec.rank_tables import RankTables
from data.cache.indexes.shard_index import MAX_BLOCK_BYTES, ShardIndex
from data.cache.manifest import TABLES_FILE, Block, Manifest, Shard
from data.cache.record import Record
from data.cache.tar import END_OF_TAR, Member, read_members
from data.storage.storage import Storage, storage_at
from kd_core.errors import UsageError

CHUNK = 1 << 20
Report = Callable[[str, str], None]  # takes the place and the problem


class DecodedBlock(NamedTuple):
    """A block that could be read.

    `where` is its shard and its number in it, and `first` the number of records before it in the cache.
    """

    where: str
    first: int
    members: list[Member]
    header: Header
    records: list[Record]


def read_coding(folder: Path | str, manifest: Manifest, report: Report) -> Coding | None:
    """Reads and checks the rank tables, and returns the codec's settings, or None where the tables are unusable."""
    storage, recorded = storage_at(folder), manifest.tables
    if (size := _file_size(storage, TABLES_FILE, report)) is None:
        return None
    if size != recorded["bytes"]:
        report(TABLES_FILE, f"has {size} bytes; the manifest says {recorded['bytes']}")
        return None
    data = storage.read(TABLES_FILE, recorded["bytes"])
    if (sha256 := hashlib.sha256(data).hexdigest()) != recorded["sha256"]:
        report(TABLES_FILE, f"sha256 {sha256[:12]}…; the manifest says {recorded['sha256'][:12]}…")
    try:
        members = {member.name: member.payload for member in read_members(data)}
        tables = RankTables.parse(members)
    except ValueError as error:
        report(TABLES_FILE, str(error))
        return None
    if tables.vocab_size != manifest.vocab_size:
        report(TABLES_FILE, f"of a vocabulary of {tables.vocab_size}; the manifest's has {manifest.vocab_size}")
        return None
    return Coding(tables, manifest.selection, manifest.codec)


def scan_blocks(
    folder: Path | str, manifest: Manifest, coding: Coding | None, report: Report
) -> Iterator[DecodedBlock]:
    """Yields the blocks that can be decoded, and reports all that is wrong with any of them.

    A block whose hash is wrong is reported, and yielded all the same if it can be decoded. Without `coding` nothing is
    decoded or yielded: only sizes, hashes and the headers of members are checked.
    """
    storage, first = storage_at(folder), 0
    for shard in manifest.shards:
        try:
            index = manifest.indexes.of(shard)
        except UsageError as error:
            report(shard.index_name, str(error).removeprefix(f"{storage.url(shard.index_name)}: "))
        else:
            yield from _shard(storage, shard, index, first, coding, report)
        first += shard.records


def _file_size(storage: Storage, name: str, report: Report) -> int | None:
    """Returns the size of a plain file, and reports anything else: reading a pipe or a device could block forever."""
    if (size := storage.size(name)) is None:
        report(name, "cannot be read (no such file, or no plain one); the manifest names it")
    return size


def _shard(
    storage: Storage, shard: Shard, index: ShardIndex, first: int, coding: Coding | None, report: Report
) -> Iterator[DecodedBlock]:
    if (size := _file_size(storage, shard.name, report)) is None:
        return
    if size != shard.bytes:
        report(shard.name, f"has {size} bytes; the manifest says {shard.bytes}")
    shard_hash = hashlib.sha256()
    for number, block in enumerate(index.blocks):
        data = storage.read_range(shard.name, block.offset, min(block.bytes, MAX_BLOCK_BYTES))
        shard_hash.update(data)
        decoded = _block(data, f"{shard.name}, block {number}", block, coding, report)
        if decoded is not None:
            yield decoded._replace(first=first)
        first += len(block.lengths)
    end = storage.read_range(shard.name, int(index.offsets[-1]), len(END_OF_TAR) + 1)
    if end != END_OF_TAR:
        report(shard.name, f"its end is not that of a tar: wanted {len(END_OF_TAR)} zero bytes and nothing behind them")
    shard_hash.update(end)
    if size <= shard.bytes and shard_hash.hexdigest() != shard.sha256:
        report(shard.name, f"sha256 {shard_hash.hexdigest()[:12]}…; the manifest says {shard.sha256[:12]}…")


def _block(data: bytes, where: str, block: Block, coding: Coding | None, report: Report) -> DecodedBlock | None:
    """Hashes and decodes a block of a shard. Returns None where it cannot be decoded."""
    if len(data) != block.bytes:
        report(where, f"is cut off: {len(data)} bytes of {block.bytes}")
    elif (sha256 := hashlib.sha256(data).hexdigest()) != block.sha256:
        report(where, f"sha256 {sha256[:12]}…; the manifest says {block.sha256[:12]}…")
    try:
        members = list(read_members(data))
        decoded = _decode(where, members, coding) if coding else None
    except Exception as error:  # damaged bytes can raise any error
        report(where, str(error) or type(error).__name__)
        return None
    if decoded and (lengths := tuple(record.positions for record in decoded.records)) != block.lengths:
        report(where, f"holds records of {lengths} positions; the manifest says {block.lengths}")
        return None
    return decoded


def _decode(where: str, members: list[Member], coding: Coding) -> DecodedBlock:
    names = [member.name.partition(".") for member in members]
    first = names[0][0] if names else ""
    if {name for name, _, _ in names} != {first}:
        raise ValueError(f"has members {', '.join(member.name for member in members)}; wanted those of one sample")
    payloads = {suffix: member.payload for (_, _, suffix), member in zip(names, members, strict=True)}
    if [suffix for _, _, suffix in names] != coding.members:
        expected = ", ".join(coding.members)
        raise ValueError(f"has members {', '.join(suffix for _, _, suffix in names)}; wanted {expected}, in this order")
    header, records = Header.parse(payloads["json"]), decode_block(payloads, coding)
    if first != f"{header.first:08d}":
        raise ValueError(f"members are named {first}; its json says that record {header.first} is its first")
    return DecodedBlock(where, 0, members, header, records)
