"""Shards: plain tars whose bytes depend on their records alone, and which appear whole, by rename."""

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from data.cache.schema import Record, encode


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """Write a tar of `records`. Owner, time and mode are fixed, so that equal records give equal bytes."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                for suffix, payload in encode(record).items():
                    member = tarfile.TarInfo(f"{record.name}.{suffix}")
                    member.size, member.mode = len(payload), 0o644
                    tar.addfile(member, io.BytesIO(payload))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
