"""Shards and tables as files.

    records → encode_block_members: encode, audit, tar members → write_shard: blocks, end of tar, fsync → rename

Their bytes depend on the records alone. A file appears under its name when it is complete.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from data.cache.codec.block import encode_block
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import RankTables
from data.cache.record import Record
from data.cache.storage import LocalStorage
from data.cache.tar import END_OF_TAR, encode_member, encode_tar
from kd_core.files import sha256


def encode_block_members(first: int, records: Sequence[Record], coding: Coding, max_kl: float) -> bytes:
    """Encodes records as one block and returns its members as bytes of a tar.

    Raises:
        ValueError: a record holds values that no teacher can produce, or the codec's mean error on the block is above
            `max_kl` nats a position.
    """
    members, audit = encode_block(first, records, coding)
    if audit["kl_mean"] > max_kl:
        raise ValueError(
            f"codec {coding.codec!r} changes the teacher by {audit['kl_mean']:.1e} nats a position on the block of "
            f"record {first} (worst {audit['kl_worst']:.1e}); the bound is {max_kl:.1e} (max_codec_kl). "
            "Take codec=lossless, or raise the bound."
        )
    return b"".join(encode_member(f"{first:08d}.{suffix}", payload) for suffix, payload in members.items())


def write_shard(path: Path, blocks: Iterable[bytes]) -> None:
    """Writes a tar of blocks."""

    def parts() -> Iterable[bytes]:
        yield from blocks
        yield END_OF_TAR

    LocalStorage(path.parent).write(path.name, parts())


def file_size_and_hash(path: Path) -> dict[str, int | str]:
    """Returns the size and the sha256 of a file, as a manifest records them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_tables(path: Path, tables: RankTables) -> None:
    """Writes the tar of a cache's rank tables."""
    LocalStorage(path.parent).write(path.name, [encode_tar(tables.members().items())])
