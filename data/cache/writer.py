"""Shards and tables as files.

    records → encode_block_members of codec/block.py → write_shard: blocks, end of tar, fsync → rename

Their bytes depend on the records alone. A file appears under its name when it is complete.
"""

from collections.abc import Iterable
from pathlib import Path

from data.cache.codec.rank_tables import RankTables
from data.cache.storage import LocalStorage
from data.cache.tar import END_OF_TAR, encode_tar
from kd_core.files import sha256


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
