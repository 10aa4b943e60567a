"""Shards in, records out, through webdataset's own opener, expander and grouper. The one module that knows it.

    url of a tar → opened stream → (member name, bytes) → one sample a record → counted, decoded strictly

`pipe:` and the like never reach webdataset, and none of its decoders is used: members stay bytes until ours.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.cache.manifest import Manifest, Shard
from data.cache.schema import Record, decode
from kd_core.errors import UsageError
from kd_core.files import sha256


def _reraise(error: Exception) -> bool:
    raise error


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    url = str(path.absolute())
    with closing(gopen(url)) as stream:  # `url_opener` would leave it open
        sources = [{"url": url, "stream": stream}]
        yield from group_by_keys(tar_file_expander(sources, handler=_reraise), handler=_reraise)


def check_shard(folder: Path, shard: Shard) -> Path:
    """The shard's path, once its size and hash are what the manifest says.

    Raises:
        UsageError: it is missing or its bytes are others.
    """
    path = folder / shard.name
    if Path(shard.name).name != shard.name or ":" in shard.name:
        raise UsageError(f"{folder}: manifest names a shard {shard.name!r}; wanted a plain file name.")
    if not path.is_file():
        raise UsageError(f"{path}: no such shard; the manifest wants it. Run the same export again to restore it.")
    size = path.stat().st_size
    if size != shard.bytes or sha256(path) != shard.sha256:
        raise UsageError(
            f"{path}: damaged: {size} bytes of another hash, wanted {shard.bytes} bytes with sha256 "
            f"{shard.sha256[:12]}…. Delete it and manifest.json and run the same export again."
        )
    return path


def read_members(path: Path) -> dict[str, dict[str, bytes]]:
    """All records of a tar as (name → suffix → bytes), in order.

    Raises:
        UsageError: not a tar, a record twice, or a member that is not a plain file of a record.
    """
    records: dict[str, dict[str, bytes]] = {}
    try:
        for sample in _samples(path):
            name = sample["__key__"]
            if name in records:
                raise UsageError(f"{path}: record {name} stands there twice.")
            records[name] = {k: v for k, v in sample.items() if not k.startswith("__")}
    except UsageError:
        raise
    except Exception as error:  # webdataset passes on whatever a damaged tar raises
        raise UsageError(f"{path}: not a readable tar ({error}). Run the same export again.") from None
    return records


def decode_all(path: Path, vocab_size: int) -> list[Record]:
    """Every record of a tar, decoded."""
    return [decode(name, members, vocab_size, str(path)) for name, members in read_members(path).items()]


class ShardReader:
    """Reads shards of one cache; verifies each once; keeps the undecoded members of those in use."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.verified: set[int] = set()
        self.held: dict[int, list[tuple[str, dict[str, bytes]]]] = {}

    def keep_only(self, shards: set[int]) -> None:
        """Forget all shards but these."""
        for index in set(self.held) - shards:
            del self.held[index]

    def record(self, shard_index: int, record_index: int) -> Record:
        """One decoded record."""
        shard = self.manifest.shards[shard_index]
        if shard_index not in self.held:
            path = check_shard(self.folder, shard) if shard_index not in self.verified else self.folder / shard.name
            self.verified.add(shard_index)
            members = list(read_members(path).items())
            if len(members) != len(shard.lengths):
                raise UsageError(f"{path}: holds {len(members)} records, the manifest wants {len(shard.lengths)}.")
            self.held[shard_index] = members
        name, members_of = self.held[shard_index][record_index]
        record = decode(name, members_of, self.manifest.vocab_size, str(self.folder / shard.name))
        if record.positions != shard.lengths[record_index]:
            raise UsageError(
                f"{self.folder / shard.name}: record {name} has {record.positions} positions, "
                f"the manifest wants {shard.lengths[record_index]}."
            )
        return record
