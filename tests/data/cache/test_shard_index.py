"""Indexes of shards: what they hold, what is refused, and lengths of all records in one read."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.cache.indexes import index_files
from data.cache.indexes.shard_index import Block, ShardIndex
from data.cache.inspection.verify import verify
from data.cache.manifest import read_manifest
from data.cache.totals import Totals
from data.stream.shards import ShardReader
from kd_core.errors import UsageError
from tests.data.cache.earlier import make_earlier
from tests.tiny import Tiny


@pytest.fixture
def cache(tiny: Tiny, tmp_path: Path) -> Path:
    return shutil.copytree(tiny.train, tmp_path / "cache")


def test_lengths_are_those_of_the_records(cache: Path, tiny: Tiny) -> None:
    manifest, positions = read_manifest(cache), [record.positions for record in tiny.records()]
    lengths = manifest.lengths
    assert lengths.records.tolist() == positions
    counts = [
        len(ShardReader(cache, manifest).block((shard, block)))
        for shard in range(len(manifest.shards))
        for block in range(manifest.shards[shard].blocks)
    ]
    assert lengths.block_starts.tolist() == np.cumsum([0, *counts]).tolist()
    assert lengths.shard_starts.tolist() == np.cumsum([0, *(shard.blocks for shard in manifest.shards)]).tolist()
    make_earlier(cache, 3)
    earlier = read_manifest(cache).lengths
    for name in ("records", "block_starts", "shard_starts"):
        assert np.array_equal(getattr(earlier, name), getattr(lengths, name))


def _edit(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at : at + len(value)] = value

    return change


NAN = struct.pack("<d", float("nan"))
BAD: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "nothing": (lambda data: data.clear(), "wanted b'KDINDEX4' and a head"),
    "another file": (_edit(0, b"KDINDEX3"), "begin with b'KDINDEX3'"),
    "cut off in its head": (lambda data: data.__delitem__(slice(100, None)), "100 bytes"),
    "cut off in its hashes": (lambda data: data.__delitem__(slice(170, None)), "ends after 170 bytes"),
    "cut off in the sha256 of its windows": (lambda data: data.__delitem__(slice(150, None)), "150 bytes that begin"),
    "the shorter head of a draft": (lambda data: data.__delitem__(slice(128, 160)), "frame|zstd|decompress|size"),
    "cut off in its lengths": (lambda data: data.pop(), "frame|zstd|decompress|cut off|damaged"),
    "bytes behind its end": (lambda data: data.extend(b"more"), "frame|zstd|follow|damaged"),
    "a shard of no bytes": (_edit(8, bytes(8)), "bytes: 0; wanted"),
    "more blocks than fit the shard": (_edit(48, b"\xff\xff\0\0"), "blocks: 65535; wanted"),
    "more records than fit the shard": (_edit(56, b"\xff\xff\xff\0"), "records: 16777215; wanted"),
    "one block less": (_edit(48, b"\1"), "frame|planes|size"),
    "other positions": (_edit(64, b"\1"), "a record's positions: they add up to"),
    "a sum that is no number": (_edit(88, NAN), "nll: nan; wanted a finite number"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_index_of_anybodys_is_parsed_strictly(cache: Path, name: str) -> None:
    change, message = BAD[name]
    data = bytearray((cache / "shard-000000.index").read_bytes())
    change(data)
    with pytest.raises(ValueError, match=message):
        ShardIndex.parse(bytes(data))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[0, 4096], [1, 1], [3, 4]], "a block's bytes: 0; wanted"),
        ([[2048, 2049], [1, 1], [3, 4]], "a block's bytes: they add up to 4097; wanted 4096"),
        ([[2048, 2048], [2, 1], [3, 4]], "a block's records: they add up to 3; wanted 2"),
        ([[2048, 2048], [1, 1], [0, 7]], "a record's positions: 0; wanted"),
        ([[2048, 2048], [1, 1], [1 << 21, 4]], "a record's positions: 2097152; wanted"),
    ],
)
def test_columns_that_do_not_fit_each_other_are_refused(column: list[list[int]], message: str) -> None:
    sizes, counts, lengths = (np.array(numbers) for numbers in column)
    digests = np.zeros((2, 32), np.uint8)
    index = ShardIndex(4096 + 1024, "0" * 64, Totals(positions=7), "1" * 64, digests, sizes, counts, lengths)
    with pytest.raises(ValueError, match=message):
        ShardIndex.parse(index.to_bytes())


def test_an_index_that_is_another_shards_or_damaged_or_missing_is_named(cache: Path) -> None:
    index = cache / "shard-000001.index"
    whole = index.read_bytes()

    def refused(match: str) -> None:
        reader = ShardReader(cache, read_manifest(cache))
        reader.block((0, 0))
        with pytest.raises(UsageError, match=match):
            reader.block((1, 0))
        with pytest.raises(UsageError, match=match):
            _ = read_manifest(cache).lengths
        assert any(problem.startswith("shard-000001.index: ") for problem in verify(cache, lambda _: None).problems)

    index.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    refused("shard-000001.index: damaged: has .* and sha256 .*, the manifest says")
    # The index of another shard, under a manifest whose hash of it is right.
    other = (cache / "shard-000000.index").read_bytes()
    manifest = json.loads((cache / "manifest.json").read_text())
    stated = manifest["shards"][1]["index"]
    manifest["shards"][1]["index"] = {"bytes": len(other), "sha256": hashlib.sha256(other).hexdigest()}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    index.write_bytes(other)
    refused("shard-000001.index: damaged: is of a shard with")
    manifest["shards"][1]["index"] = stated
    (cache / "manifest.json").write_text(json.dumps(manifest))
    index.unlink()
    refused("shard-000001.index: no such file")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (88, struct.pack("<d", 1.0), "statistics.teacher_nll is "),
        (128, b"\xab" * 32, "is of windows and loss masks of sha256 abababababab…; the records' is "),
    ],
)
def test_sums_and_windows_of_an_index_that_are_not_the_shards_are_found(
    cache: Path, at: int, value: bytes, message: str
) -> None:
    path = cache / "shard-000001.index"
    data = bytearray(path.read_bytes())
    _edit(at, value)(data)
    path.write_bytes(data)
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][1]["index"]["sha256"] = hashlib.sha256(data).hexdigest()
    (cache / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify(cache, lambda _: None).problems
    assert problem.startswith(f"shard-000001.index: {message}")


def test_few_indexes_are_held_and_each_is_read_once_while_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, reads = read_manifest(cache), list[str]()
    plain = index_files.read_index

    def counted(storage: index_files.Storage, shard: index_files.Shard) -> ShardIndex:
        reads.append(shard.name)
        return plain(storage, shard)

    monkeypatch.setattr(index_files, "read_index", counted)
    names = [shard.name for shard in manifest.shards]
    for _ in range(2):
        for shard in range(2):
            manifest.block(shard, 0)
    assert reads == names[:2]
    monkeypatch.setattr(index_files, "MOST_HELD_BYTES", 1)
    manifest.block(2, 0)
    manifest.block(0, 0)
    assert reads == [*names[:3], names[0]]
    assert [manifest.block(0, 0).lengths, manifest.block(2, 0).lengths] == [
        tuple(len(r.token_ids) - 1 for r in ShardReader(cache, manifest).block((shard, 0))) for shard in (0, 2)
    ]


def test_what_is_written_is_parsed_again() -> None:
    blocks = [Block(2560, "ab" * 32, (1, 2, 1 << 20)), Block(4096, "cd" * 32, (7,))]
    totals = Totals((1 << 20) + 10, 5, 3, 1.5, 2.5, 0.1, 0.2, 0.3)
    index = ShardIndex.from_blocks(2560 + 4096 + 1024, "ef" * 32, blocks, totals, "12" * 32)
    again = ShardIndex.parse(index.to_bytes())
    assert (again.facts, again.totals, again.windows_sha256) == (index.facts, totals, "12" * 32)
    assert [(b.bytes, b.sha256, b.lengths, b.offset) for b in again.blocks] == [
        (2560, "ab" * 32, (1, 2, 1 << 20), 0),
        (4096, "cd" * 32, (7,), 2560),
    ]
