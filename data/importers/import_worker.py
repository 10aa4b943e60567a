"""The work of a process of an import: parts of the source to blocks, and shards read back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.cache.codec.block import encode_block_members
from data.cache.codec.coding import Coding
from data.cache.selection import Selection
from data.cache.storage import storage_at
from data.cache.writer import read_back, write_index
from data.importers.formats import format_of
from data.importers.import_journal import EncodedBlock, Reached, WrittenShard
from data.importers.parsed_entries import Line
from data.importers.settings import Chunk, ImportSettings
from data.stream.shards import read_tables
from kd_core.errors import UsageError


class Worker:
    """What a process of the conversion needs: the job, and the coding of the cache."""

    job: ImportSettings
    coding: Coding
    folder: Path

    @classmethod
    def prepare(cls, job: ImportSettings, folder: Path, tables_facts: dict[str, Any]) -> None:
        """Reads the tables. Each process calls it once."""
        cls.job, cls.folder = job, folder
        facts = format_of(job).facts(job)
        cls.coding = Coding(read_tables(folder, tables_facts), facts.selection if facts else Selection(1), job.codec)

    @classmethod
    def encode(cls, chunk: Chunk) -> list[EncodedBlock]:
        """Returns the blocks of a chunk.

        Raises:
            UsageError: a row does not fit the format, or the codec's error is above the bound.
        """
        return [cls._encode(lines) for lines in group_lines(format_of(cls.job).lines(chunk, cls.job), cls.job)]

    @classmethod
    def _encode(cls, lines: list[Line]) -> EncodedBlock:
        records = [line.record for line in lines]
        try:
            data = encode_block_members(0, records, cls.coding, cls.job.max_codec_kl)
        except ValueError as error:
            raise UsageError(f"{records[0].document} to {records[-1].document}: {error}.") from None
        longest = max(record.positions for record in records)
        widest = max(record.topk_token_ids.shape[1] for record in records)
        return EncodedBlock(data, len(records), longest, widest, frozenset.union(*(line.unknown for line in lines)))

    @classmethod
    def read_back(cls, written: tuple[str, Reached]) -> WrittenShard:
        """Reads a shard that was just written, checks its alignment, and writes its index."""
        name, storage = written[0], storage_at(cls.folder)
        index = read_back(storage, name, cls.coding, f"{cls.job.source}, {name}")
        assert index.totals
        return WrittenShard(write_index(storage, name, index), index.totals, written[1])


def group_lines(lines: Iterator[Line], job: ImportSettings) -> Iterator[list[Line]]:
    """Yields runs of neighbouring records of at most `block_positions`, or of one longer record."""
    block, positions = list[Line](), 0
    for line in lines:
        if block and positions + line.record.positions > job.block_positions:
            yield block
            block, positions = [], 0
        block.append(line)
        positions += line.record.positions
    if block:
        yield block
