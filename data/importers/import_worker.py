"""The work of a process of an import: parts of the source to blocks, and shards read back."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.cache.codec.block import encode_block_members
from data.cache.codec.coding import Coding
from data.cache.writer import read_back, write_index
from data.importers.formats.formats import format_of
from data.importers.import_journal import EncodedBlock, Reached, WrittenShard
from data.importers.parsed_entries import Line
from data.importers.settings import Chunk, ImportSettings
from data.storage.storage import storage_at
from kd_core.errors import UsageError
from kd_core.files import printable

WorkerJob = Chunk | tuple[str, Reached]
"""A part of the source to encode, or a shard to read back and how far it reaches."""


class Worker(NamedTuple):
    """Work of a process of the conversion, with the job, and the folder and the coding of the cache."""

    settings: ImportSettings
    folder: Path
    coding: Coding

    def run(self, job: WorkerJob) -> list[EncodedBlock] | WrittenShard:
        """Encodes a chunk, or reads a shard back.

        Raises:
            UsageError: a row does not fit the format, or the codec's error is above the bound.
        """
        return self._encode(job) if isinstance(job, Chunk) else self._read_back(*job)

    def _encode(self, chunk: Chunk) -> list[EncodedBlock]:
        lines = format_of(self.settings).lines(chunk, self.settings)
        return [self._encode_block(block) for block in group_lines(lines, self.settings)]

    def _encode_block(self, lines: list[Line]) -> EncodedBlock:
        records = [line.record for line in lines]
        try:
            data = encode_block_members(0, records, self.coding, self.settings.max_codec_kl)
        except ValueError as error:
            raise UsageError(f"{records[0].document} to {records[-1].document}: {error}.") from None
        longest = max(record.positions for record in records)
        widest = max(record.topk_token_ids.shape[1] for record in records)
        return EncodedBlock(data, len(records), longest, widest, frozenset.union(*(line.unknown for line in lines)))

    def _read_back(self, name: str, reached: Reached) -> WrittenShard:
        """Reads a shard that was just written, checks its alignment, and writes its index."""
        storage = storage_at(self.folder)
        index = read_back(storage, name, self.coding, f"{self.settings.source}, {name}")
        assert index.totals
        return WrittenShard(write_index(storage, name, index), index.totals, reached)


def describe_job(job: WorkerJob) -> str:
    """Returns the beginning of the message where the process of a job ends."""
    if isinstance(job, Chunk):
        return f"{printable(job.path)}: the process that converted it"
    return f"{job[0]}: the process that read it back"


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
