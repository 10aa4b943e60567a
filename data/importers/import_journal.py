"""How far an import is: the shards that are written and read back, in a file that survives an interruption."""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

from data.cache.indexes.shard_index import ShardIndex, index_name
from data.cache.manifest_fields import Shard
from data.cache.totals import Totals
from data.cache.writer import file_facts
from kd_core.files import write_text

JOURNAL_FILE = "conversion.jsonl"


class EncodedBlock(NamedTuple):
    """A block of a chunk, numbered from 0 on, with what its lines show of the source."""

    data: bytes
    records: int
    longest: int
    widest: int
    unknown: frozenset[str]


class Reached(NamedTuple):
    """Reach of the shards: so many chunks, blocks of the next one, and sums over these."""

    chunks: int = 0
    blocks: int = 0
    records: int = 0
    longest: int = 0
    widest: int = 0
    unknown: frozenset[str] = frozenset()

    def with_block(self, chunk: int, block: int, encoded: EncodedBlock) -> "Reached":
        """Counts one more block, of a chunk."""
        return Reached(
            chunk, block + 1, self.records + encoded.records, max(self.longest, encoded.longest),
            max(self.widest, encoded.widest), self.unknown | encoded.unknown,
        )  # fmt: skip


class WrittenShard(NamedTuple):
    """A shard as it was read back, and how far it reaches."""

    shard: Shard
    totals: Totals
    reached: Reached


class Journal:
    """The shards that are written and read back, a line each. Their indexes hold the sums that go into the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL_FILE
        self.reached, self.shards, self.totals = Reached(), list[Shard](), Totals()
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        # What an interruption left of a line, and lines of shards that are not there any more, are written anew.
        whole = list(itertools.takewhile(self._take, lines))
        write_text(self.path, "".join(whole))

    def _take(self, line: str) -> bool:
        if not line.endswith("\n"):
            return False
        value = json.loads(line)
        name, index_path = value["shard"], self.folder / index_name(value["shard"])
        if not (path := self.folder / name).exists() or not index_path.exists():
            return False
        data = index_path.read_bytes()
        index = ShardIndex.parse(data)
        if index.shard_bytes != path.stat().st_size or index.totals is None:
            return False
        self.shards.append(Shard.from_index(name, index, file_facts(data)))
        self.totals += index.totals
        *sums, unknown = value["reached"]
        self.reached = Reached(*sums, unknown=frozenset(unknown))
        return True

    def add(self, written: WrittenShard) -> None:
        """Adds a shard, and its line."""
        self.totals += written.totals
        self.shards.append(written.shard)
        self.reached = written.reached
        reached = [*self.reached[:-1], sorted(self.reached.unknown)]
        with self.path.open("a") as file:
            file.write(json.dumps({"shard": written.shard.name, "reached": reached}) + "\n")
