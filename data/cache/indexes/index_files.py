"""Index files of a cache's shards, read when they are asked for, or all of them in parallel."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.cache.indexes.lengths import CacheLengths
from data.cache.indexes.shard_index import ShardIndex
from data.cache.manifest_fields import Shard
from data.storage.storage import RETRY_SECONDS, Storage, storage_at
from kd_core.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")
READERS = 16  # files that are read side by side
MOST_HELD_BYTES = 1 << 28
REMEDY = "Restore it, or delete it and manifest.json and run the same export again, which makes it from the shard."


def in_parallel(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Returns results of `work` in order, computed by `READERS` threads. After an error nothing more is begun."""
    with ThreadPoolExecutor(READERS) as executor:
        futures = [executor.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def read_index(storage: Storage, shard: Shard) -> ShardIndex:
    """Reads the index of a shard.

    Raises:
        UsageError: it is missing, damaged, or another one than the manifest states.
    """
    assert shard.index
    url, stated = storage.url(shard.index_name), shard.index
    data = storage.read(shard.index_name, stated["bytes"])
    if (digest := hashlib.sha256(data).hexdigest()) != stated["sha256"]:
        raise UsageError(
            f"{url}: damaged: has {len(data)} bytes and sha256 {digest[:12]}…, the manifest says {stated['bytes']} and "
            f"{stated['sha256'][:12]}…. {REMEDY}"
        )
    try:
        index = ShardIndex.parse(data)
        if index.facts != shard.facts:
            raise ValueError(f"is of a shard with {index.facts}; the manifest says {shard.facts}")
    except ValueError as error:
        raise UsageError(f"{url}: damaged: {error}. {REMEDY}") from None
    return index


class IndexFiles:
    """The indexes of a cache's shards. Those used last are held, up to `MOST_HELD_BYTES`. Thread-safe.

    Args:
        path: the cache's folder or URL, None where all indexes are given.
        retry_seconds: seconds in which a failed request is tried again.
        given: indexes by the names of their shards, as the manifests of earlier versions hold them.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        retry_seconds: float = RETRY_SECONDS,
        given: Mapping[str, ShardIndex] | None = None,
    ) -> None:
        self.path, self.retry_seconds, self.given = path, retry_seconds, given or {}
        self._storage = None if path is None else storage_at(path, retry_seconds)
        self._held: OrderedDict[str, ShardIndex] = OrderedDict()
        self._lock, self._bytes = threading.Lock(), 0

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexFiles, (self.path, self.retry_seconds, self.given)

    def of(self, shard: Shard) -> ShardIndex:
        """Returns the index of a shard, and reads it if it is not held."""
        if shard.name in self.given:
            return self.given[shard.name]
        with self._lock:
            if shard.name in self._held:
                self._held.move_to_end(shard.name)
                return self._held[shard.name]
        assert self._storage
        index = read_index(self._storage, shard)
        with self._lock:
            if shard.name not in self._held:
                self._held[shard.name] = index
                self._bytes += index.held_bytes
            while self._bytes > MOST_HELD_BYTES and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1].held_bytes
        return index

    def lengths(self, shards: Sequence[Shard]) -> CacheLengths:
        """Returns the lengths of all records, read by `READERS` threads into arrays of their final size."""
        # First block and first record of each shard.  [S + 1]
        shard_starts = np.cumsum([0, *(shard.blocks for shard in shards)])
        record_starts = np.cumsum([0, *(shard.records for shard in shards)])
        records = np.empty(record_starts[-1], np.int32)  # [R]
        block_starts = np.zeros(shard_starts[-1] + 1, np.int64)  # [blocks + 1]

        def fill(number: int) -> None:
            index = self.of(shards[number])
            records[record_starts[number] : record_starts[number + 1]] = index.lengths
            ends = record_starts[number] + index.first_records[1:]
            block_starts[shard_starts[number] + 1 : shard_starts[number + 1] + 1] = ends

        in_parallel(fill, range(len(shards)))
        return CacheLengths(records, block_starts, shard_starts)
