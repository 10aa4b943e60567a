"""What others would keep a teacher's top-k in, each written and read through its own library.

A record is a sample (JSONL: a line; Parquet: a row of lists; safetensors: a slice of its shard's tensors). Ids are
uint16 where the vocabulary allows it, else uint32, log-probabilities float16: each format's best natural choice.
Label, tail and mask stand beside them (float16, uint8); ours keeps all of that too. `read` gives one epoch: shards
permuted, by the library where it does that, then records of a window permuted, by the library where it does that,
else by `shuffled`. A MDS epoch begins with the compressed files, as a first one does: those it decompressed are deleted
between epochs; without compression it reads the raw files and no hash.
"""

import importlib
import importlib.machinery
import io
import json
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cached_records import shards_of
from data.cache.record import Array, Record
from kd_core.files import sha256

WINDOW_RECORDS = 256
COLUMNS = ("token_ids", "loss_mask", "topk_token_ids", "topk_log_probs", "tail_log_prob", "label_log_prob")
Write = Callable[[Path, Sequence[Record], type], None]
Read = Callable[[Path, int], Iterator[Record]]


class Format(NamedTuple):
    """A way to keep records; `library` must be importable; `verified` says by what a flipped bit would be seen."""

    name: str
    library: str
    verified: str
    shuffle: str
    write: Write
    read: Read
    before: Callable[[Path], None] = lambda _: None

    @property
    def there(self) -> bool:
        return find_spec(self.library) is not None


def columns_of(record: Record, ids: type) -> dict[str, Array]:
    """Arrays of a record, as small as is natural."""
    types_of = (ids, np.uint8, ids, np.float16, np.float16, np.float16)
    return {name: getattr(record, name).astype(dtype) for name, dtype in zip(COLUMNS, types_of, strict=True)}


def record_of(name: str, columns: dict[str, Any]) -> Record:
    return Record(name, "", 0, *(columns[column] for column in COLUMNS))


def shuffled(records: Iterator[Record], seed: int) -> Iterator[Record]:
    """Records permuted within a buffer, as webdataset has it."""
    random, held = np.random.default_rng(seed), list[Record]()
    for record in records:
        if len(held) < WINDOW_RECORDS:
            held.append(record)
            continue
        at = int(random.integers(len(held)))
        yield held[at]
        held[at] = record
    yield from (held[i] for i in random.permutation(len(held)))


def permuted(folder: Path, ending: str, seed: int) -> list[Path]:
    """The shards of a folder."""
    paths = sorted(folder.glob(f"*{ending}"))
    return [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]


# npz members of a tar, through webdataset


def _write_npz(save: Callable[..., None]) -> Write:
    def write(folder: Path, records: Sequence[Record], ids: type) -> None:
        from webdataset import TarWriter

        for number, own in enumerate(shards_of(records)):
            with TarWriter(str(folder / f"{number:06d}.tar")) as tar:
                for record in own:
                    file = io.BytesIO()
                    save(file, **columns_of(record, ids))
                    tar.write({"__key__": record.name, "npz": file.getvalue()})

    return write


def _read_npz(folder: Path, seed: int) -> Iterator[Record]:
    from webdataset import WebDataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    stream = WebDataset(urls, shardshuffle=len(urls), seed=seed).shuffle(WINDOW_RECORDS, initial=WINDOW_RECORDS)
    for sample in stream.decode():
        yield record_of(sample["__key__"], sample["npz"])


# Parquet, through pyarrow


def _write_parquet(compression: str) -> Write:
    def write(folder: Path, records: Sequence[Record], ids: type) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for number, own in enumerate(shards_of(records)):
            rows = [columns_of(record, ids) for record in own]
            table: dict[str, Any] = {"name": [record.name for record in own]}
            for column in COLUMNS:
                ends = np.cumsum([0, *(row[column].size for row in rows)]).astype(np.int32)
                table[column] = pa.ListArray.from_arrays(ends, np.concatenate([row[column].ravel() for row in rows]))
            pq.write_table(
                pa.table(table), folder / f"{number:06d}.parquet", compression=compression, use_dictionary=False,
                row_group_size=16, write_statistics=False, write_page_checksum=True,
            )  # fmt: skip

    return write


def _read_parquet(folder: Path, seed: int) -> Iterator[Record]:
    import pyarrow.parquet as pq

    def in_order() -> Iterator[Record]:
        for path in permuted(folder, ".parquet", seed):
            with pq.ParquetFile(path, page_checksum_verification=True, memory_map=True) as file:
                for batch in file.iter_batches(16, use_threads=False):
                    yield from _rows(batch)

    return shuffled(in_order(), seed)


def _rows(batch: Any) -> Iterator[Record]:
    """Records of a record batch, views of its columns."""
    values = {name: batch.column(name).values.to_numpy(zero_copy_only=True) for name in COLUMNS}
    ends = {name: batch.column(name).offsets.to_numpy() for name in COLUMNS}
    for row, name in enumerate(batch.column("name").to_pylist()):
        own = {column: values[column][ends[column][row] : ends[column][row + 1]] for column in COLUMNS}
        for column in ("topk_token_ids", "topk_log_probs"):
            own[column] = own[column].reshape(len(own["loss_mask"]), -1)
        yield record_of(name, own)


# MDS, through mosaicml-streaming


def _streaming() -> Any:
    """The library. It imports torchvision for its images; where that is not there, an empty one stands in."""
    if "streaming" not in sys.modules and find_spec("torchvision") is None:
        importlib.import_module("transformers").utils.import_utils.is_torchvision_available()
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module = types.ModuleType(f"torchvision{name}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            module.__path__ = []
            sys.modules[module.__name__] = module
        vars(sys.modules["torchvision.datasets"])["VisionDataset"] = object
        vars(sys.modules["torchvision.transforms.functional"])["to_tensor"] = None
    return importlib.import_module("streaming")


def _write_mds(compression: str | None) -> Write:
    def write(folder: Path, records: Sequence[Record], ids: type) -> None:
        wide = {name: f"ndarray:{each.dtype.name}" for name, each in columns_of(records[0], ids).items()}
        with _streaming().MDSWriter(
            out=str(folder), columns={"name": "str", **wide}, compression=compression, hashes=["xxh64"],
            size_limit=1 << 24, exist_ok=True,
        ) as out:  # fmt: skip
            for record in records:
                out.write({"name": record.name, **columns_of(record, ids)})

    return write


def _fresh_mds(folder: Path) -> None:
    """Forget what an epoch has decompressed, where there is the compressed file too."""
    for path in folder.glob("*.mds.zstd"):
        path.with_suffix("").unlink(missing_ok=True)


def _read_mds(folder: Path, seed: int) -> Iterator[Record]:
    streaming = _streaming()
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        local=str(folder), shuffle=True, shuffle_seed=seed, batch_size=1, num_canonical_nodes=1,
        shuffle_block_size=WINDOW_RECORDS, validate_hash="xxh64",
    )  # fmt: skip
    for sample in dataset:
        yield record_of(sample["name"], sample)


# safetensors


def _write_safetensors(folder: Path, records: Sequence[Record], ids: type) -> None:
    from safetensors.numpy import save_file

    for number, own in enumerate(shards_of(records)):
        rows = [columns_of(record, ids) for record in own]
        whole = {column: np.concatenate([row[column] for row in rows]) for column in COLUMNS}
        whole["positions"] = np.array([record.positions for record in own], np.int32)
        save_file(whole, folder / f"{number:06d}.safetensors", {"first": own[0].name})


def _read_safetensors(folder: Path, seed: int) -> Iterator[Record]:
    return _safetensors(folder, seed, {})


def _write_hashed_safetensors(folder: Path, records: Sequence[Record], ids: type) -> None:
    _write_safetensors(folder, records, ids)
    hashes = {path.name: sha256(path) for path in folder.glob("*.safetensors")}
    (folder / "hashes.json").write_text(json.dumps(hashes))


def _read_hashed_safetensors(folder: Path, seed: int) -> Iterator[Record]:
    return _safetensors(folder, seed, json.loads((folder / "hashes.json").read_text()))


def _safetensors(folder: Path, seed: int, hashes: dict[str, str]) -> Iterator[Record]:
    from safetensors import safe_open

    def in_order() -> Iterator[Record]:
        for path in permuted(folder, ".safetensors", seed):
            if hashes and sha256(path) != hashes[path.name]:
                raise ValueError(f"{path}: damaged")
            with safe_open(path, "np") as file:
                whole, first = file.get_tensors(), int(file.metadata()["first"])
            ends = np.cumsum(whole["positions"])
            tokens = np.split(whole.pop("token_ids"), (ends + np.arange(1, len(ends) + 1))[:-1])
            parts = {name: np.split(whole[name], ends[:-1]) for name in COLUMNS[1:]}
            for row, token_ids in enumerate(tokens):
                own = {name: parts[name][row] for name in parts}
                yield record_of(f"{first + row:08d}", {"token_ids": token_ids, **own})

    return shuffled(in_order(), seed)


# JSON lines, as NeMo-Aligner writes them


def _json() -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    if find_spec("orjson"):
        fast = importlib.import_module("orjson")
        return fast.dumps, fast.loads
    return (lambda value: json.dumps(value).encode()), json.loads


def _write_jsonl(folder: Path, records: Sequence[Record], ids: type) -> None:
    dumps, _ = _json()
    for number, own in enumerate(shards_of(records)):
        with (folder / f"{number:06d}.jsonl").open("wb") as file:
            for record in own:
                columns = columns_of(record, ids)
                plain = {name: columns[name].tolist() for name in COLUMNS[:3]}
                rounded = {name: np.round(columns[name].astype(np.float64), 4).tolist() for name in COLUMNS[3:]}
                file.write(dumps({"name": record.name, **plain, **rounded}) + b"\n")


def _read_jsonl(folder: Path, seed: int) -> Iterator[Record]:
    _, loads = _json()

    def in_order() -> Iterator[Record]:
        for path in permuted(folder, ".jsonl", seed):
            with path.open("rb") as file:
                for line in file:
                    found = loads(line)
                    dtypes = (np.int32, np.uint8, np.int32, np.float32, np.float32, np.float32)
                    arrays = {c: np.array(found[c], d) for c, d in zip(COLUMNS, dtypes, strict=True)}
                    yield record_of(found["name"], arrays)

    return shuffled(in_order(), seed)


OURS, THEIRS = "our window", "its own"
FORMATS = [
    Format("npz deflated, webdataset", "webdataset", "CRC-32", THEIRS, _write_npz(np.savez_compressed), _read_npz),
    Format("npz stored, webdataset", "webdataset", "CRC-32", THEIRS, _write_npz(np.savez), _read_npz),
    Format("Parquet zstd, pyarrow", "pyarrow", "CRC-32 a page", OURS, _write_parquet("zstd"), _read_parquet),
    Format("Parquet raw, pyarrow", "pyarrow", "CRC-32 a page", OURS, _write_parquet("none"), _read_parquet),
    Format("MDS zstd, streaming", "streaming", "xxh64", THEIRS, _write_mds("zstd"), _read_mds, _fresh_mds),
    Format("MDS raw, streaming", "streaming", "nothing", THEIRS, _write_mds(None), _read_mds),
    Format("safetensors", "safetensors", "nothing", OURS, _write_safetensors, _read_safetensors),
    Format(
        "safetensors, hashed by us",
        "safetensors",
        "sha256 a file",
        OURS,
        _write_hashed_safetensors,
        _read_hashed_safetensors,
    ),
    Format("JSON lines", "json", "nothing", OURS, _write_jsonl, _read_jsonl),
]
UNVERIFIED = {each.name for each in FORMATS if each.verified == "nothing"}
