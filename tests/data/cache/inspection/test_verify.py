"""A whole cache passes; of a damaged one all that is wrong is named, with shard, block, member and what was wanted."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.cache.inspection.scan import read_coding, scan_blocks
from data.cache.inspection.survey import Survey
from data.cache.inspection.verify import Findings, verify
from data.cache.manifest import read_manifest
from data.cache.selection import Selection
from data.stream.shards import ShardReader
from tests.tiny import Tiny, write_caches


@pytest.fixture
def cache(tiny: Tiny, tmp_path: Path) -> Path:
    return shutil.copytree(tiny.train, tmp_path / "cache")


def _verify(folder: Path) -> Findings:
    return verify(folder, lambda _: None)


def _edit(folder: Path, name: str, change: Callable[[bytearray], None]) -> None:
    data = bytearray((folder / name).read_bytes())
    change(data)
    (folder / name).write_bytes(data)


def _manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((folder / "manifest.json").read_text())
    change(value)
    (folder / "manifest.json").write_text(json.dumps(value))


def test_a_whole_cache_passes_and_every_byte_is_counted(cache: Path) -> None:
    found = _verify(cache)
    assert found.problems == []
    assert found.bytes == sum(path.stat().st_size for path in cache.iterdir())
    assert (found.records, found.positions) == (found.manifest.records, found.manifest.positions)


@pytest.mark.parametrize(
    ("selection", "codec"),
    [
        (Selection(top_k=8, min_prob=0.02), "compact"),
        (Selection(top_k=20, mass=0.9, tail_temperatures=(2.0,)), "lossless"),
        (Selection(top_k=0, draws=6), "standard"),
        (Selection(top_k=4, draws=5, proposal_temperature=1.5), "standard"),
    ],
)
def test_every_kind_of_cache_passes(tiny: Tiny, tmp_path: Path, selection: Selection, codec: str) -> None:
    write_caches(tiny.export(selection=selection, codec=codec), tmp_path)
    assert _verify(tmp_path / "train").problems == []
    assert _verify(tmp_path / "validation").problems == []


def test_all_that_is_wrong_is_named(cache: Path) -> None:
    def flip(data: bytearray) -> None:
        data[700] ^= 1
        data[-1] ^= 1

    _edit(cache, "shard-000000.tar", flip)
    (cache / "shard-000001.tar").unlink()
    _edit(cache, "shard-000002.tar", lambda data: data.extend(b"more"))
    (cache / "shard-000007.tar").write_bytes(b"")
    problems = _verify(cache).problems
    wanted = [
        "shard-000000.tar, block 0: sha256",
        "shard-000000.tar: its end is not that of a tar",
        "shard-000000.tar: sha256",
        "shard-000001.tar: cannot be read (no such file, or no plain one)",
        "shard-000002.tar: has",
        "shard-000002.tar: its end",
        f"manifest.json: says {read_manifest(cache).records} records",
        "shard-000007.tar: does not belong to the cache",
    ]
    for each in wanted:
        assert any(problem.startswith(each) for problem in problems), (each, problems)


def test_a_member_is_named(cache: Path) -> None:
    """The payload of the ids, found behind its header."""

    def flip(data: bytearray) -> None:
        data[data.index(b"00000000.entries.zst") + 512 + 20] ^= 1

    _edit(cache, "shard-000000.tar", flip)
    assert any(each.startswith("shard-000000.tar, block 0: entries.zst: ") for each in _verify(cache).problems)


def test_damaged_tables_leave_the_hashes_to_check(cache: Path) -> None:
    _edit(cache, "tables.tar", lambda data: data.__setitem__(600, data[600] ^ 1))
    _edit(cache, "shard-000001.tar", lambda data: data.__setitem__(600, data[600] ^ 1))
    problems = _verify(cache).problems
    assert any(each.startswith("tables.tar: sha256") for each in problems)
    assert any(each.startswith("shard-000001.tar, block 0: sha256") for each in problems)


FIGURES = {
    "statistics.teacher_nll": lambda m: m["statistics"].update(teacher_nll=0.5),
    "statistics.entries": lambda m: m["statistics"].update(entries=7),
    "audit.kl_mean": lambda m: m["audit"].update(kl_mean=0.0),
    "audit.kl_worst": lambda m: m["audit"].update(kl_worst=0.0),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_the_manifest_are_those_of_its_blocks(cache: Path, name: str) -> None:
    _manifest(cache, FIGURES[name])
    assert [each.partition(" is ")[0] for each in _verify(cache).problems] == [f"manifest.json: {name}"]


def test_shards_in_another_order_and_another_selection_are_found(cache: Path) -> None:
    _manifest(cache, lambda m: (m["shards"].reverse(), m["selection"].update(top_k=4), m.update(row_length=16)))
    problems = "\n".join(_verify(cache).problems)
    assert "block 0: begins with record" in problems
    assert "has 8 entries and 0 samples a position; the selection top 4" in problems
    assert "has a record of 32 positions; the manifest's row_length is 16" in problems


def test_a_plan_of_another_export_is_found(cache: Path) -> None:
    (cache / "plan.json").write_text("{}")
    assert _verify(cache).problems == ["plan.json: is not one of the plans in the manifest"]


def test_a_plan_that_stands_twice_or_is_only_equal_to_python_is_found(cache: Path) -> None:
    _manifest(cache, lambda m: m["plans"].append(m["plans"][0]))
    assert "manifest.json: has a plan twice" in _verify(cache).problems
    _manifest(cache, lambda m: (m["plans"].pop(), m["plans"][0].update(seed=False)))
    assert _verify(cache).problems == ["plan.json: is not one of the plans in the manifest"]


def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(cache: Path) -> None:
    (cache / "shard-000001.tar").unlink()
    os.mkfifo(cache / "shard-000001.tar")
    assert (
        "shard-000001.tar: cannot be read (no such file, or no plain one); the manifest names it"
        in _verify(cache).problems
    )


def tiny_top(folder: Path) -> np.ndarray:
    records = ShardReader(folder, read_manifest(folder)).records()
    return np.concatenate([record.topk_log_probs.max(axis=1) for record in records]).astype(np.float64)


def test_the_survey_counts_every_byte_and_position(cache: Path) -> None:
    def refuse(where: str, what: str) -> None:
        raise AssertionError(f"{where}: {what}")

    manifest, survey = read_manifest(cache), Survey()
    for visited in scan_blocks(cache, manifest, read_coding(cache, manifest, refuse), refuse):
        survey.add(visited)
    survey.add_files(cache, manifest)
    assert survey.total_bytes == sum(path.stat().st_size for path in cache.iterdir())
    assert (survey.records, survey.positions) == (manifest.records, manifest.positions)
    assert survey.nll / survey.positions == pytest.approx(manifest.statistics["teacher_nll"], rel=1e-9)
    coverage = dict(survey.coverage(8))
    assert list(coverage) == ["K = 1", "all stored"]
    assert coverage["all stored"] == pytest.approx(manifest.statistics["teacher_mass"], rel=1e-9)
    assert coverage["K = 1"] == pytest.approx(np.exp(tiny_top(cache)).mean(), rel=1e-6)
    assert Survey().coverage(0) == []
    assert (survey.entries.least, survey.entries.most, survey.entries.mean) == (8, 8, 8.0)
