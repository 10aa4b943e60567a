"""Import of other systems' records as a cache:

    lines ─► pilot ─► tables      lines ─► records ─► blocks ─► tars ─► manifest, with what the source did not state

The source is read once, and only one shard's blocks are in memory. The folder gets its name at the end, by a rename.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.cache.codec.block import encode_block_members
from data.cache.codec.coding import Coding
from data.cache.codec.levels import Codec
from data.cache.codec.rank_tables import fit_tables
from data.cache.index_files import IndexFiles
from data.cache.manifest import Manifest, Shard, made_now
from data.cache.record import Record
from data.cache.selection import Selection
from data.cache.storage import storage_at
from data.cache.totals import Totals
from data.cache.writer import read_back, write_index, write_shard, write_tables
from data.importers.lines import PARSERS, Line, read_records, source_files
from data.stream.shards import read_tables
from kd_core.errors import UsageError
from kd_core.files import content_fingerprint, new_folder
from kd_core.ranges import check_settings

UNKNOWN = "unknown"
BYTES_OF_AN_ENTRY = 25  # in JSON, about: an id and a number


@dataclass(frozen=True)
class ImportSettings:
    """Settings of an import.

    Args:
        kind: format of the source, one of `PARSERS`.
        source: a file, a folder, or a path with CHUNK_ID.
        vocab_size: tokens of the real vocabulary.
        tokenizer: the tokenizer's fingerprint, or `UNKNOWN`.
        codec: how blocks are coded.
        max_codec_kl: largest mean KL(original‖decoded) of a block, in nats. The import stops above it.
        block_positions: about the number of positions that are coded together.
        shard_bytes: about the size of a shard.
        columns: columns of a padded model, if more than `vocab_size`. Entries of padding are left out.
    """

    kind: str
    source: str
    vocab_size: int
    tokenizer: str
    codec: Codec = "standard"
    max_codec_kl: float = 1e-3
    block_positions: int = 8192
    shard_bytes: int = 4_000_000
    columns: int = 0

    def __post_init__(self) -> None:
        if self.kind not in PARSERS:
            raise UsageError(f"--format: got {self.kind!r}; wanted one of {', '.join(PARSERS)}.")
        check_settings(self, "--")
        if self.vocab_size < 1 or self.block_positions < 1 or self.shard_bytes < 1:
            raise UsageError("wanted a vocabulary, block_positions and shard_bytes of at least 1.")


class _CountedRecords:
    """The records of lines, with the longest, the widest and the unknown fields of those read so far."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self.lines, self.unknown = lines, set[str]()
        self.longest = self.widest = 0

    def __iter__(self) -> Iterator[Record]:
        for line in self.lines:
            self.unknown |= line.unknown
            self.longest = max(self.longest, line.record.positions)
            self.widest = max(self.widest, line.record.topk_token_ids.shape[1])
            yield line.record


def _group_blocks(records: Iterator[Record], most: int) -> Iterator[list[Record]]:
    """Yields runs of neighbouring records of at most `most` positions, or of one longer record."""
    block: list[Record] = []
    for record in records:
        if block and sum(earlier.positions for earlier in block) + record.positions > most:
            yield block
            block = []
        block.append(record)
    if block:
        yield block


def _encode_shards(blocks: Iterator[list[Record]], coding: Coding, job: ImportSettings) -> Iterator[list[bytes]]:
    """Yields lists of encoded blocks, each of at most `shard_bytes` or of one larger block."""
    shard: list[bytes] = []
    first = 0
    for block in blocks:
        try:
            data = encode_block_members(first, block, coding, job.max_codec_kl)
        except ValueError as error:
            raise UsageError(f"{block[0].document} to {block[-1].document}: {error}.") from None
        if shard and sum(map(len, shard)) + len(data) > job.shard_bytes:
            yield shard
            shard = []
        shard.append(data)
        first += len(block)
    if shard:
        yield shard


def import_cache(job: ImportSettings, out: Path) -> Manifest:
    """Writes the cache `out` and returns its manifest.

    Raises:
        UsageError: `out` exists already, or a line does not fit its format.
    """
    if out.exists():
        raise UsageError(f"{out}: exists already. Choose another --out, or delete it.")
    files = source_files(job.source)
    counted = _CountedRecords(read_records(job.source, job.kind, job.vocab_size, job.columns))
    blocks = _group_blocks(iter(tqdm(counted, unit="record", mininterval=1)), job.block_positions)
    pilot = next(blocks, None)
    if pilot is None:
        raise UsageError(f"{job.source}: holds no record.")
    with new_folder(out) as folder:
        # The tables' size follows the cache's size, which is estimated from the source's bytes.
        about_positions = sum(path.stat().st_size for path in files) // (BYTES_OF_AN_ENTRY * counted.widest)
        storage = storage_at(folder)
        tables_facts = write_tables(storage, fit_tables(pilot, job.vocab_size, about_positions))
        coding = Coding(read_tables(folder, tables_facts), Selection(top_k=1), job.codec)
        shards, totals = list[Shard](), Totals()
        for number, encoded_blocks in enumerate(_encode_shards(chain([pilot], blocks), coding, job)):
            name = f"shard-{number:06d}.tar"
            write_shard(storage, name, encoded_blocks)
            index = read_back(storage, name, coding, f"{job.source}, {name}")
            assert index.totals
            totals += index.totals
            shards.append(write_index(storage, name, index))
        manifest = _make_manifest(job, counted, totals, tables_facts, tuple(shards))
        manifest.write(storage)
    return replace(manifest, indexes=IndexFiles(out))


def _make_manifest(
    job: ImportSettings, counted: _CountedRecords, totals: Totals, tables: dict[str, Any], shards: tuple[Shard, ...]
) -> Manifest:
    unknown = counted.unknown | ({"tokenizer"} if job.tokenizer == UNKNOWN else set())
    selection = Selection(top_k=counted.widest)
    plan = {
        "source": job.kind,
        "content": content_fingerprint(source_files(job.source)),
        "codec": job.codec,
        "tokenizer": job.tokenizer,
        "row_length": counted.longest,
    }
    return Manifest(
        vocab_size=job.vocab_size,
        tokenizer=job.tokenizer,
        teacher={"source": job.kind, "weights": UNKNOWN, "dtype": UNKNOWN},
        selection=selection,
        row_length=counted.longest,
        codec=job.codec,
        audit=totals.audit(),
        statistics=totals.statistics(),
        tables=tables,
        plans=(plan,),
        shards=shards,
        unknown=tuple(sorted(unknown)),
        made=made_now(UNKNOWN, [job.source]),
    )
