"""A manifest of anybody's: every field of its exact type and in bounds, or one message that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.cache.inspection.verify import verify
from data.cache.manifest import parse_manifest, read_manifest
from data.stream.shards import ShardReader
from kd_core.errors import UsageError
from tests.tiny import Tiny

Change = Callable[[dict[str, Any]], object]


def _at(*path: str | int) -> Callable[[Any], Change]:
    def to(value: Any) -> Change:
        def change(manifest: Any) -> None:
            for name in path[:-1]:
                manifest = manifest[name]
            manifest[path[-1]] = value

        return change

    return to


NAME, BLOCK, LENGTH = (
    _at("shards", 0, "name"),
    _at("shards", 0, "blocks", 0, "bytes"),
    ("shards", 0, "blocks", 0, "lengths", 0),
)
BAD: dict[str, tuple[Change, str]] = {
    "another format": (_at("format")("npz"), "format and version are 'npz' and 3"),
    "another version": (_at("version")(4), "format and version are .* and 4"),
    "a version that only looks right": (_at("version")(2.0), "and 2.0; wanted"),
    "a path upwards": (NAME("../shard-000000.tar"), "a shard's name is '../shard"),
    "an absolute path": (NAME("/etc/passwd"), "a shard's name is '/etc/passwd'"),
    "a command": (NAME("pipe:id"), "a shard's name is 'pipe:id'"),
    "a name with a null": (NAME("a\0.tar"), "a shard's name"),
    "a name with a line break": (NAME("a.tar\n"), "a shard's name"),
    "the tables as a shard": (NAME("tables.tar"), "a shard's name is 'tables.tar'"),
    "a name that is a number": (NAME(7), "a shard's name: 7; wanted a string"),
    "a shard twice": (lambda m: m["shards"].append(m["shards"][0]), "shard-000000.tar stands twice"),
    "a block of nothing": (BLOCK(0), "a block's bytes: 0; wanted"),
    "a block of less than nothing": (BLOCK(-512), "a block's bytes: -512; wanted"),
    "a block of exabytes": (BLOCK(10**18), "a block's bytes: 10+; wanted"),
    "a block of a thousand digits": (BLOCK(10**1000), "a number of 3322 bits"),
    "a block of a fraction": (BLOCK(512.0), "a block's bytes: 512.0"),
    "a block of true bytes": (BLOCK(True), "a block's bytes: True"),
    "a block larger than its shard": (BLOCK(1 << 20), "its blocks and the tar's end have"),
    "a shard of less than its blocks": (_at("shards", 0, "bytes")(1024), "its blocks and the tar's end have"),
    "a hash that is short": (_at("shards", 0, "sha256")("00"), "wanted 64 hexadecimal digits"),
    "a hash that is none": (_at("shards", 0, "blocks", 0, "sha256")(None), "None; wanted a string"),
    "a record of no positions": (_at(*LENGTH)(0), "a record's positions: 0"),
    "a record of endless positions": (_at(*LENGTH)(1 << 40), "a record's positions"),
    "no records": (_at("shards", 0, "blocks", 0, "lengths")([]), "a block has no records"),
    "shards as an object": (_at("shards")({}), "shards: a dict; wanted a list"),
    "a shard as a list": (_at("shards", 0)([]), "a shard: a list; wanted an object"),
    "no vocabulary": (_at("vocab_size")(0), "vocab_size: 0"),
    "an endless vocabulary": (_at("vocab_size")(1 << 60), "vocab_size"),
    "a field missing": (lambda m: m.pop("row_length"), "field 'row_length' is missing"),
    "a field too many": (_at("more")(1), "field 'more' is unknown"),
    "an unknown codec": (_at("codec")("npz"), "codec: 'npz'; wanted one of standard, compact, lossless"),
    "an empty selection": (_at("selection", "top_k")(0), "keep nothing"),
    "a selection of a fraction": (_at("selection", "top_k")(8.0), "selection.top_k: 8.0"),
    "a temperature of words": (_at("selection", "tail_temperatures")(["hot"]), "'hot'; wanted a finite number"),
    "temperatures as words": (_at("selection", "tail_temperatures")("22"), "'22'; wanted a list"),
    "an endless temperature": (_at("selection", "proposal_temperature")(float("inf")), "wanted a finite number"),
    "an error that is no number": (_at("audit", "kl_mean")(float("nan")), "audit.kl_mean: nan"),
    "an error of hundreds of digits": (_at("audit", "kl_mean")(10**400), "audit.kl_mean: a number of 1329 bits"),
    "a figure of words": (_at("statistics", "teacher_nll")("low"), "statistics.teacher_nll: 'low'"),
    "a figure missing": (lambda m: m["statistics"].pop("teacher_mass"), "teacher_mass is missing"),
    "endless tables": (_at("tables", "bytes")(1 << 50), "tables.bytes"),
    "plans as a number": (_at("plans")(1), "plans: 1; wanted a list"),
    "a teacher as a name": (_at("teacher")("gpt"), "teacher: 'gpt'; wanted an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_by_name(tiny: Tiny, name: str) -> None:
    change, message = BAD[name]
    value = json.loads((tiny.train / "manifest.json").read_text())
    change(value)
    with pytest.raises(UsageError, match=message) as found:
        parse_manifest(value, "cache/manifest.json")
    assert str(found.value).startswith("cache/manifest.json: ")
    assert len(str(found.value)) < 400


@pytest.mark.parametrize("value", [None, 3, "x", [], [1], [["format", 1]]])
def test_another_value_than_an_object_is_no_manifest(value: object) -> None:
    with pytest.raises(UsageError, match="format and version are"):
        parse_manifest(value, "cache/manifest.json")


TEXTS = [
    b"",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b'{"a": ' + b"9" * 100_000 + b"}",
    b"{} {}",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(UsageError, match="manifest.json: "):
        read_manifest(tmp_path)


def test_an_endless_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes up nothing
    with pytest.raises(UsageError, match="has 1099511627776 bytes; at most"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["shard-000001.tar", "tables.tar"])
def test_a_file_that_is_mostly_hole_is_not_read(tiny: Tiny, tmp_path: Path, name: str) -> None:
    cache = shutil.copytree(tiny.train, tmp_path / "cache")
    with (cache / name).open("r+b") as file:
        file.truncate(1 << 40)
    problems = verify(cache, lambda _: None).problems
    assert f"{name}: has 1099511627776 bytes; the manifest says " in "\n".join(problems)
    if name != "tables.tar":
        reader = ShardReader(cache, read_manifest(cache))
        with pytest.raises(UsageError, match="the shard has 1099511627776 bytes"):
            reader.block((1, len(reader.manifest.shards[1].blocks) - 1))
