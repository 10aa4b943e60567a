"""Shards, their indexes and tables as files of a storage.

    records → encode_block_members of codec/block.py → write_shard: blocks, end of tar
            → read_back: decoded strictly, hashed, summed → write_index: the receipt of a verified shard

Their bytes depend on the records alone. A file appears under its name when it is complete.
"""

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

from data.cache import webdataset_io
from data.cache.alignment import check_alignment
from data.cache.codec.block import decode_block
from data.cache.codec.coding import Coding
from data.cache.codec.header import Header
from data.cache.codec.rank_tables import RankTables
from data.cache.contents import record_digest, windows_digest
from data.cache.indexes.shard_index import MAX_SHARD_BYTES, Block, ShardIndex, index_name
from data.cache.manifest_fields import TABLES_FILE, Shard
from data.cache.tar import END_OF_TAR, encode_tar, read_members
from data.cache.totals import Totals
from data.storage.storage import Storage
from kd_core.errors import UsageError


def write_shard(storage: Storage, name: str, blocks: Iterable[bytes]) -> None:
    """Writes a tar of blocks."""
    storage.write(name, itertools.chain(blocks, [END_OF_TAR]))


def file_facts(data: bytes) -> dict[str, Any]:
    """Returns the size and the sha256 of a file, as a manifest records them."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_tables(storage: Storage, tables: RankTables) -> dict[str, Any]:
    """Writes the tar of a cache's rank tables, and returns its size and sha256."""
    data = encode_tar(tables.members().items())
    storage.write(TABLES_FILE, [data])
    return file_facts(data)


def read_back(storage: Storage, name: str, coding: Coding, source: str | None = None) -> ShardIndex:
    """Reads a whole shard strictly, and returns its index.

    Args:
        storage: where the shard is.
        name: its name.
        coding: how its blocks are coded.
        source: what its records come from, for the error of labels and entries that are shifted (None: the shard).

    Raises:
        UsageError: the shard is missing or damaged, or its labels and entries are shifted.
    """
    data, url = storage.read(name, MAX_SHARD_BYTES), storage.url(name)
    blocks, totals, digests = list[Block](), Totals(), list[bytes]()
    try:
        # Members of a block share a name up to the first dot. Of each block, the offset of its first member remains.
        starts = {member.name.partition(".")[0]: member.offset for member in reversed(list(read_members(data)))}
        edges = [*sorted(starts.values()), len(data) - len(END_OF_TAR)]
        for start, end in itertools.pairwise(edges):
            members = webdataset_io.read_block_members(data[start:end], url)
            records = decode_block(members, coding)
            check_alignment(records, source or url)
            totals += Totals.from_block(Header.parse(members["json"]), records)
            digests.extend(map(record_digest, records))
            lengths = tuple(record.positions for record in records)
            blocks.append(Block(end - start, hashlib.sha256(data[start:end]).hexdigest(), lengths))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{url}: damaged: block {len(blocks)}: {error}. Delete the shard and run the same export again."
        ) from None
    sha256 = hashlib.sha256(data).hexdigest()
    return ShardIndex.from_blocks(len(data), sha256, blocks, totals, windows_digest(digests))


def write_index(storage: Storage, name: str, index: ShardIndex) -> Shard:
    """Writes the index of a shard, and returns the shard's entry in the manifest."""
    data = index.to_bytes()
    storage.write(index_name(name), [data])
    return Shard.from_index(name, index, file_facts(data))
