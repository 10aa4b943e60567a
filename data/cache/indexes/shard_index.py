"""The index of a shard, `shard-000000.index`: its blocks with their hashes, the lengths of its records, and sums.

It is written after the shard was read back, so it is also the receipt of a shard that was verified.

    head: magic, bytes and sha256 of the shard, counts, sums, sha256 of windows ─ sha256 of each block ─ one zstd
    frame: block bytes, records of each block, positions of each record, each in 4 byte planes
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.cache.codec.header import MAX_POSITIONS
from data.cache.codec.planes import compress, decompress, join_planes, split_planes
from data.cache.tar import END_OF_TAR
from data.cache.totals import Totals
from kd_core.json_fields import check_integer, check_number

Array = np.ndarray[Any, np.dtype[Any]]
MAGIC = b"KDINDEX4"
MAX_BLOCK_BYTES, MAX_SHARD_BYTES, MAX_INDEX_BYTES = 1 << 29, 1 << 50, 1 << 28
MAX_BLOCKS, MAX_RECORDS = 1 << 22, 1 << 26  # of one shard
# The header of a block holds at least 8 bytes of each record. A block has at least two members of a tar.
LEAST_RECORD_BYTES, LEAST_BLOCK_BYTES = 8, 2048
PLANES, DIGEST_BYTES = 4, 32
# Magic, bytes and sha256 of the shard, blocks, records, the fields of `Totals`, and the sha256 of windows and masks.
HEAD = struct.Struct(f"<8sQ{DIGEST_BYTES}sQQ3Q5d{DIGEST_BYTES}s")


@dataclass(frozen=True)
class Block:
    """Consecutive bytes of a shard that are read and verified as one.

    `lengths` are the positions of its records, in order, and `offset` the byte of the shard where it begins.
    """

    bytes: int
    sha256: str
    lengths: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Blocks and records of one shard, and the sums over its positions. B blocks, R records.

    Args:
        shard_bytes: size of the shard.
        shard_sha256: its sha256.
        totals: sums over its positions, None where an earlier version wrote none.
        windows_sha256: sha256 over the digests of its records' windows and loss masks, `record_digest` of
            `data/cache/contents.py`. None where an earlier version wrote none.
        digests: sha256 of each block.  [B, 32]
        block_bytes: bytes of each block.  [B]
        block_records: number of records of each block.  [B]
        lengths: positions of each record.  [R]
    """

    shard_bytes: int
    shard_sha256: str
    totals: Totals | None
    windows_sha256: str | None
    digests: Array
    block_bytes: Array
    block_records: Array
    lengths: Array

    @classmethod
    def from_blocks(
        cls, size: int, sha256: str, blocks: Sequence[Block], totals: Totals | None, windows_sha256: str | None
    ) -> "ShardIndex":
        digests = np.frombuffer(bytes.fromhex("".join(block.sha256 for block in blocks)), np.uint8)
        return cls(
            size, sha256, totals, windows_sha256, digests.reshape(-1, DIGEST_BYTES),
            np.array([block.bytes for block in blocks], np.int64),
            np.array([len(block.lengths) for block in blocks], np.int64),
            np.array([length for block in blocks for length in block.lengths], np.int32),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.block_bytes)

    @cached_property
    def offsets(self) -> Array:
        """Returns where each block begins, and where the last one ends.  [B + 1]"""
        return np.concatenate([[0], np.cumsum(self.block_bytes)])

    @cached_property
    def first_records(self) -> Array:
        """Returns the number of records in front of each block, and in all.  [B + 1]"""
        return np.concatenate([[0], np.cumsum(self.block_records)])

    def block(self, number: int) -> Block:
        """Returns a block by its number in the shard."""
        first, last = self.first_records[number : number + 2]
        return Block(
            int(self.block_bytes[number]), self.digests[number].tobytes().hex(),
            tuple(self.lengths[first:last].tolist()), int(self.offsets[number]),
        )  # fmt: skip

    @property
    def held_bytes(self) -> int:
        """Returns about how much memory the index takes."""
        return sum(array.nbytes for array in (self.digests, self.block_bytes, self.block_records, self.lengths))

    @property
    def blocks(self) -> Iterable[Block]:
        return (self.block(number) for number in range(len(self)))

    @property
    def facts(self) -> tuple[int, str, int, int, int]:
        """Returns what a manifest repeats: bytes and sha256 of the shard, and its blocks, records and positions."""
        return self.shard_bytes, self.shard_sha256, len(self), len(self.lengths), int(self.lengths.sum(dtype=np.int64))

    def to_bytes(self) -> bytes:
        """Returns the bytes of the index file."""
        assert self.totals
        assert self.windows_sha256
        head = HEAD.pack(
            MAGIC, self.shard_bytes, bytes.fromhex(self.shard_sha256), len(self), len(self.lengths),
            *astuple(self.totals), bytes.fromhex(self.windows_sha256),
        )  # fmt: skip
        columns = (self.block_bytes, self.block_records, self.lengths)
        planes = [plane for column in columns for plane in split_planes(column, PLANES)]
        return head + self.digests.tobytes() + compress(planes)

    @classmethod
    def parse(cls, data: bytes) -> "ShardIndex":
        """Parses an index file and checks every number.

        Raises:
            ValueError: it is damaged, or a number is out of bounds.
        """
        if len(data) < HEAD.size or data[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{len(data)} bytes that begin with {data[:8]!r}; wanted {MAGIC!r} and a head")
        _, size, digest, blocks, records, *sums, windows_digest = HEAD.unpack_from(data)
        check_shape(size, blocks, records)
        ends = HEAD.size + DIGEST_BYTES * blocks
        if len(data) < ends:
            raise ValueError(f"ends after {len(data)} bytes; hashes of {blocks} blocks end at {ends}")
        digests = np.frombuffer(data, np.uint8, DIGEST_BYTES * blocks, HEAD.size).reshape(blocks, DIGEST_BYTES)
        # 12 planes: the 4 bytes of block bytes [B], records of blocks [B], and positions of records [R].
        counts = (blocks, blocks, records)
        planes = decompress(data[ends:], [count for count in counts for _ in range(PLANES)])
        sizes, numbers, lengths = (join_planes(planes[start : start + PLANES]) for start in (0, PLANES, 2 * PLANES))
        _check_column("a block's bytes", sizes, MAX_BLOCK_BYTES, size - len(END_OF_TAR))
        _check_column("a block's records", numbers, MAX_POSITIONS, records)
        _check_column("a record's positions", lengths, MAX_POSITIONS, sums[0])
        for name, value in zip(("nll", "mass", "kl_sum", "kl_worst", "mass_error"), sums[3:], strict=True):
            check_number(value, name)
        return cls(
            size, digest.hex(), Totals(*sums), windows_digest.hex(), digests, sizes.astype(np.int64),
            numbers.astype(np.int64), lengths.astype(np.int32),
        )  # fmt: skip


def check_shape(size: int, blocks: int, records: int) -> None:
    """Checks the bytes, blocks and records of a shard against bounds, and against each other."""
    check_integer(size, "bytes", 1, MAX_SHARD_BYTES)
    check_integer(blocks, "blocks", 1, min(MAX_BLOCKS, max(1, size // LEAST_BLOCK_BYTES)))
    check_integer(records, "records", blocks, min(MAX_RECORDS, max(blocks, size // LEAST_RECORD_BYTES)))


def _check_column(name: str, column: Array, most: int, total: int) -> None:
    """Checks that each number is from 1 to `most`, and their sum."""
    least, largest = int(column.min()), int(column.max())
    if least < 1 or largest > most:
        raise ValueError(f"{name}: {least if least < 1 else largest}; wanted a whole number from 1 to {most}")
    if (found := int(column.sum(dtype=np.int64))) != total:
        raise ValueError(f"{name}: they add up to {found}; wanted {total}")


def index_name(shard: str) -> str:
    """Returns the name of a shard's index file."""
    return shard.removesuffix(".tar") + ".index"
