"""A cache as a Hugging Face data set: Parquet files, a card that `datasets.load_dataset` reads, and `cache.json`.

    manifest ─► parts: runs of blocks ─► processes: blocks ─► rows ─► data/train-00000-of-00012.parquet ─► README.md

The columns are described in `data/importers/formats/huggingface.py`. Rows are the cache's records in its order. A file
appears by rename, so after an interruption the same command writes those that are missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.cache.manifest import Manifest, read_manifest
from data.cache.record import UNUSED, Array, Record
from data.importers.facts import FACTS_FILE, Facts, tail_column
from data.stream.order import BlockRef
from data.stream.shards import ShardReader
from data.worker_processes import worker_processes
from kd_core.errors import UsageError
from kd_core.files import new_folder_target, own_folder, read_json, write_json, write_text

FILE_POSITIONS = 1 << 18  # about, of a Parquet file
CLAIM_FILE = "conversion.json"
SPLITS = ("train", "validation", "test")
CARD = """---
configs:
- config_name: default
  data_files:
  - split: {split}
    path: data/{split}-*.parquet
tags:
- knowledge-distillation
- teacher-logits
---

# Teacher's log-probabilities of a corpus

{records} records with {positions} positions. At each one stand {selection} of the teacher, mean
mass {mass:.4f}, with natural log-probabilities over the whole vocabulary of {vocab_size} ids.

```python
from datasets import load_dataset

rows = load_dataset("FOLDER", split="{split}")
```

| column | content |
|---|---|
{columns}

Position t holds input token t. Its entries and its label describe token t + 1. Numbers are float32, as the cache's
reader gives them; its codec ({codec}) had changed the teacher by {kl:.1e} nats a position. {unknown}
`cache.json` says what the columns do not. `launchers.convert --format=huggingface` of KD Workspace reads the rows back.
"""


class Part(NamedTuple):
    """A file of the data set, and the blocks of the cache that it holds."""

    path: Path
    blocks: tuple[BlockRef, ...]


@dataclass(frozen=True)
class Column:
    """A column: its name, what stands in it, and Arrow's type of a row: numbers, lists of them, or a single value."""

    name: str
    content: str
    kind: str


def columns_of(manifest: Manifest) -> list[Column]:
    """Returns the columns of a cache's records."""
    selection = manifest.selection
    columns = [
        Column("document", "the document's name", "text"),
        Column("start", "index in the document of the first token", "number"),
        Column("token_ids", "T + 1 ids: inputs are the first T, labels the last T", "ids"),
        Column("loss_mask", "T times 0 or 1", "mask"),
        Column("topk_token_ids", "T lists of the ids of a position's entries", "lists of ids"),
        Column("topk_log_probs", "T lists of their log-probabilities", "lists of floats"),
        Column("tail_log_prob", "T times the log of the mass of all other tokens", "floats"),
        Column("label_log_prob", "T times the log-probability of token t + 1", "floats"),
    ]
    columns += [
        Column(tail_column(t), f"T times log Σ p^(1/{t:g}) over the tokens that are no entries", "floats")
        for t in selection.tail_temperatures
    ]
    if selection.draws:
        columns += [
            Column("sampled_token_ids", "T lists of tokens drawn from the tail", "lists of ids"),
            Column("sampled_log_weights", "T lists of their log importance weights", "lists of floats"),
        ]
    return columns


def _values(record: Record, column: str) -> Any:
    """Returns a record's value of a column. Unused entries are left out of lists."""
    if column in ("topk_token_ids", "topk_log_probs"):
        return _used(getattr(record, column), record.topk_log_probs)
    if column in ("sampled_token_ids", "sampled_log_weights"):
        ids, weights = record.samples()
        return _used(ids if column == "sampled_token_ids" else weights, weights)
    tails = {tail_column(t): tail for t, tail in record.tempered_tails.items()}
    return tails[column] if column in tails else getattr(record, column)


def _used(values: Array, logs: Array) -> list[Array]:
    return [row[used] for row, used in zip(values, logs > UNUSED, strict=True)]


@dataclass(frozen=True)
class _Writer:
    """Work of a process: the cache, and a reader of it, which the first file opens."""

    source: str
    manifest: Manifest

    @cached_property
    def reader(self) -> ShardReader:
        return ShardReader(self.source, self.manifest)

    def run(self, part: Part) -> int:
        """Writes a file of the data set, unless it is there, and returns the number of its records."""
        import pyarrow as pa  # noqa: PLC0415 (an extra)
        from pyarrow import parquet  # noqa: PLC0415

        ids, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
        types = {
            "text": pa.string(), "number": pa.int64(), "ids": ids, "mask": pa.list_(pa.uint8()), "floats": floats,
            "lists of ids": pa.list_(ids), "lists of floats": pa.list_(floats),
        }  # fmt: skip
        schema = pa.schema([(column.name, types[column.kind]) for column in columns_of(self.manifest)])
        records = sum(len(self.manifest.block(shard, block).lengths) for shard, block in part.blocks)
        if part.path.exists():
            return records
        partial = part.path.with_name(part.path.name + ".partial")
        with parquet.ParquetWriter(partial, schema, compression="zstd", write_page_checksum=True) as writer:
            for ref in part.blocks:
                block = self.reader.block(ref)
                arrays = {name: [_values(record, name) for record in block] for name in schema.names}
                writer.write_table(pa.Table.from_pydict(arrays, schema=schema))
                self.reader.keep_only(set())
        partial.rename(part.path)
        return records


def _describe(part: Part) -> str:
    return f"{part.path}: the process that wrote it"


def _parts(manifest: Manifest, folder: Path, split: str) -> list[Part]:
    """Cuts a cache into runs of blocks of about `FILE_POSITIONS`."""
    groups, positions = list[list[BlockRef]](), FILE_POSITIONS
    for index, shard in enumerate(manifest.shards):
        for number in range(shard.blocks):
            if positions >= FILE_POSITIONS:
                groups.append([])
                positions = 0
            groups[-1].append((index, number))
            positions += sum(manifest.block(index, number).lengths)
    names = (f"{split}-{i:05d}-of-{len(groups):05d}.parquet" for i in range(len(groups)))
    return [Part(folder / "data" / name, tuple(blocks)) for name, blocks in zip(names, groups, strict=True)]


def _card(manifest: Manifest, split: str) -> str:
    """Returns the text of `README.md`."""
    unknown = f"Not known from the cache's own source: {', '.join(manifest.unknown)}." if manifest.unknown else ""
    return CARD.format(
        split=split, records=manifest.records, positions=manifest.positions, selection=manifest.selection.words(),
        mass=manifest.statistics["teacher_mass"], vocab_size=manifest.vocab_size, codec=manifest.codec,
        columns="\n".join(f"| `{column.name}` | {column.content} |" for column in columns_of(manifest)),
        kl=manifest.audit.kl_mean, unknown=unknown,
    )  # fmt: skip


def _records(counts: Iterator[int], manifest: Manifest) -> int:
    with tqdm(total=manifest.records, unit="record", mininterval=1) as bar:
        for count in counts:
            bar.update(count)
        return int(bar.n)


def write_dataset(source: str, out: Path, processes: int = 1) -> str:
    """Writes the data set `out` of a cache, and describes it in one line. Files that are there already are kept.

    Raises:
        UsageError: `out` is something else already, the cache is damaged, or pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise UsageError("--to=huggingface needs the extra: pip install 'kd-workspace[parquet]'.")
    manifest, folder = read_manifest(source), new_folder_target(out)
    split = name if (name := source.rstrip("/").rpartition("/")[2]) in SPLITS else SPLITS[0]
    present = {path.name for path in folder.iterdir()} if folder.exists() else set[str]()
    if present - {".lock"} and CLAIM_FILE not in present:
        raise UsageError(f"{out}: exists already. Choose another --out, or delete it.")
    with own_folder(folder):
        claim = {"cache": manifest.identity(), "split": split}
        if not (folder / CLAIM_FILE).exists():
            write_json(folder / CLAIM_FILE, claim)
        elif read_json(folder / CLAIM_FILE, "what a conversion was begun for") != claim:
            raise UsageError(f"{out}: holds a conversion of another cache. Choose another --out, or delete it.")
        (folder / "data").mkdir(exist_ok=True)
        parts = _parts(manifest, folder, split)
        processes = min(processes, len(parts)) if min(processes, len(parts)) > 1 else 0
        with worker_processes(_Writer(source, manifest).run, _describe, processes) as run:
            records = _records(run(parts), manifest)
        write_json(folder / FACTS_FILE, Facts.from_manifest(manifest).as_json())
        write_text(folder / "README.md", _card(manifest, split))
        for name in (CLAIM_FILE, ".lock"):
            (folder / name).unlink(missing_ok=True)
    return f"{out}: {records} records in {len(parts)} files, with a card and {FACTS_FILE}"
