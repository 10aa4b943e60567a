"""The reading benchmark runs every format whose library is there, and each gives back what was written."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import formats, reading
from benchmarks.cached_records import drawn, made_up, repeated, shards_of
from data.cache.record import UNUSED, Record

POSITIONS, VOCAB, TOP_K = 3000, 500, 8
SMALL = [f"--positions={POSITIONS}", f"--vocab={VOCAB}", f"--top-k={TOP_K}", "--rounds=1", "--row-length=1024"]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return repeated(made_up(POSITIONS, VOCAB, TOP_K), POSITIONS)


def run(tmp_path: Path, *more: str) -> str:
    return reading.run(reading.parsed([*SMALL, f"--folder={tmp_path}", *more]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [each.name for each in formats.FORMATS])
def test_every_format_reads_each_record_once_and_as_it_was(name: str, records: list[Record], tmp_path: Path) -> None:
    (each,) = (each for each in formats.FORMATS if each.name == name)
    if not each.there:
        pytest.skip(f"{each.library} is not installed")
    each.write(tmp_path, records, np.uint16)
    for seed in (0, 1):
        each.before(tmp_path)
        found = {record.name: record for record in each.read(tmp_path, seed)}
        assert sorted(found) == [record.name for record in records]
        for record in records:
            np.testing.assert_array_equal(found[record.name].token_ids, record.token_ids)
            np.testing.assert_array_equal(found[record.name].topk_token_ids, record.topk_token_ids)
            np.testing.assert_allclose(found[record.name].topk_log_probs, record.topk_log_probs, rtol=1e-3, atol=1e-4)
            np.testing.assert_array_equal(found[record.name].loss_mask, record.loss_mask)


def test_table_and_bars_of_ours_beside_a_peer(tmp_path: Path) -> None:
    shown = run(tmp_path, "--only", "ours", "JSON")
    for name in ("ours, standard", "ours, compact", "ours, lossless", "ours, p ≥ 3e-3", "ours, 12 draws", "JSON lines"):
        assert f"| {name} |" in shown
    assert "times the fastest peer" in shown
    assert "| 0.0e+00 | sha256 a block |" in shown


def test_profile_names_parts_that_make_up_most_of_the_time(tmp_path: Path) -> None:
    shown = run(tmp_path, "--only", "standard", "--profile")
    shares = {line[:28].strip(): float(line.rstrip("%").split()[-1]) for line in shown.splitlines()[1:]}
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert min(shares[part] for part in ("sha256", "zstd", "ids", "log-probs", "collate")) > 0


def test_bars_are_yes_only_where_they_are_reached() -> None:
    lines = reading.bars({reading.STANDARD: 1.3e6, "JSON lines": 0.5e6, "safetensors": 1e6}).splitlines()
    assert [line.split("seen")[1].split()[1] for line in lines] == ["yes", "no", "no"]
    assert lines[2].endswith("safetensors")


def test_made_up_records_are_what_a_teacher_could_have_said() -> None:
    for record in made_up(POSITIONS, VOCAB, TOP_K):
        assert (np.diff(np.sort(record.topk_token_ids, axis=1), axis=1) > 0).all()
        mass = np.exp(record.topk_log_probs).sum(axis=1) + np.exp(record.tail_log_prob)
        np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_draws_are_weighted_to_one(records: list[Record]) -> None:
    record = drawn(records[0], 12, VOCAB, np.random.default_rng(0))
    ids, weights = record.samples()
    np.testing.assert_allclose(np.exp(weights).sum(axis=1), 1, atol=1e-5)
    for row, used in zip(ids, weights > UNUSED, strict=True):
        assert len(set(row[used])) == used.sum()


def test_shards_hold_every_record_once(records: list[Record]) -> None:
    assert [record.name for shard in shards_of(records) for record in shard] == [record.name for record in records]
