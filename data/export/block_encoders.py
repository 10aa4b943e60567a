"""Encoding of blocks, in this process or in processes beside it.

    blocks of records ─► encode_block_members ─► bytes of a tar, in the order of the blocks

Beside a GPU, a thread that encodes would hold the interpreter's lock while the thread that feeds the GPU waits for it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from data.cache.codec.block import encode_block_members
from data.cache.codec.coding import Coding
from data.cache.record import Record
from data.worker_processes import MapJobs, worker_processes
from kd_core.errors import UsageError


class BlockJob(NamedTuple):
    """A block to encode: its records, the number of the first of them, and the shard that it is for."""

    shard: str
    first: int
    records: Sequence[Record]


class EncoderSettings(NamedTuple):
    """Settings of `encode_block_members` that all blocks of a cache share."""

    coding: Coding
    max_kl: float

    def encode(self, job: BlockJob) -> bytes:
        """Encodes a block.

        Raises:
            UsageError: a record holds values that no teacher can produce, or the codec's error is above the bound.
        """
        try:
            return encode_block_members(job.first, job.records, self.coding, self.max_kl)
        except ValueError as error:
            raise UsageError(f"{job.shard}: {error}") from None


def _describe(job: BlockJob) -> str:
    return f"{job.shard}: the process that encoded its blocks"


def block_encoders(settings: EncoderSettings, processes: int) -> AbstractContextManager[MapJobs[BlockJob, bytes]]:
    """Yields a function that encodes blocks: as they are asked for, or ahead of that in so many `processes`.

    The bytes are the same.
    """
    return worker_processes(settings.encode, _describe, processes)
