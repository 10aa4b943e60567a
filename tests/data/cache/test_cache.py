"""The cache on disk: what is damaged is named, what is shifted is refused."""

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.cache.alignment import check_alignment
from data.cache.manifest import read_manifest
from data.cache.selection import Selection
from data.stream.shards import ShardReader
from data.stream.source import Shards
from kd_core.errors import UsageError
from tests.tiny import Tiny, write_caches


def test_what_the_teacher_said_sums_to_one_and_no_entry_stands_twice(tiny: Tiny) -> None:
    for record in tiny.records():
        mass = np.exp(record.topk_log_probs.astype(np.float64)).sum(1) + np.exp(record.tail_log_prob)
        assert np.abs(mass - 1).max() < 1e-5
        assert all(len(set(ids)) == len(ids) for ids in record.topk_token_ids.tolist())


def test_a_shard_is_a_plain_tar(tiny: Tiny) -> None:
    for name in ("shard-000000.tar", "tables.tar"):
        with tarfile.open(tiny.train / name) as tar:
            assert all(member.isfile() and member.mtime == 0 for member in tar)


@pytest.mark.parametrize("at", [10, 600, 3000, -2000])
def test_one_flipped_byte_is_found_before_anything_is_read(tiny: Tiny, tmp_path: Path, at: int) -> None:
    shutil.copytree(tiny.train, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-000001.tar"
    payload = bytearray(shard.read_bytes())
    payload[at] ^= 1
    shard.write_bytes(payload)
    reader = ShardReader(tmp_path / "cache", read_manifest(tmp_path / "cache"))
    reader.block((0, 0))
    with pytest.raises(UsageError, match=r"shard-000001.tar: damaged: block \d: "):
        for block in range(reader.manifest.shards[1].blocks):
            reader.block((1, block))


def test_a_missing_shard_is_named(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.train, tmp_path / "cache")
    (tmp_path / "cache" / "shard-000001.tar").unlink()
    with pytest.raises(UsageError, match="shard-000001.tar: no such file"):
        ShardReader(tmp_path / "cache", read_manifest(tmp_path / "cache")).block((1, 0))


def test_tables_of_another_cache_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.train, tmp_path / "cache")
    shutil.copy(tiny.validation / "tables.tar", tmp_path / "cache")
    with pytest.raises(UsageError, match="tables.tar: damaged: (sha256|has)"):
        ShardReader(tmp_path / "cache", read_manifest(tmp_path / "cache"))


def test_an_export_that_has_not_ended_says_so(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UsageError, match="has not ended"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_cache_that_is_one_off_is_refused(tiny: Tiny, shift: int) -> None:
    """Tokens against everything that the teacher said."""
    shifted = [replace(r, token_ids=np.roll(r.token_ids, shift)) for r in tiny.records()]
    with pytest.raises(UsageError, match="shifted against the teacher"):
        check_alignment(shifted, "cache")


@pytest.mark.parametrize("shift", [-1, 1])
def test_entries_that_are_one_off_from_label_log_probs_are_refused(tiny: Tiny, shift: int) -> None:
    shifted = [
        replace(
            r,
            topk_token_ids=np.roll(r.topk_token_ids, shift, axis=0),
            topk_log_probs=np.roll(r.topk_log_probs, shift, axis=0),
            tail_log_prob=np.roll(r.tail_log_prob, shift),
        )
        for r in tiny.records()
    ]
    with pytest.raises(UsageError, match="shifted against the teacher"):
        check_alignment(shifted, "cache")


@pytest.mark.parametrize("shift", [-1, 1])
def test_samples_that_are_one_off_are_refused(tiny: Tiny, tmp_path: Path, shift: int) -> None:
    write_caches(tiny.export(selection=Selection(top_k=0, draws=6)), tmp_path)
    records = tiny.records(tmp_path / "train")
    check_alignment(records, "cache")
    shifted = [replace(r, token_ids=np.roll(r.token_ids, shift)) for r in records]
    with pytest.raises(UsageError, match="shifted against the teacher"):
        check_alignment(shifted, "cache")


def test_an_aligned_cache_passes_and_another_tokenizer_or_vocabulary_does_not(tiny: Tiny) -> None:
    shards, manifest = Shards(str(tiny.train)), read_manifest(tiny.train)
    shards.check(manifest.vocab_size, manifest.tokenizer)
    with pytest.raises(UsageError, match="written with tokenizer"):
        shards.check(manifest.vocab_size, "another")
    with pytest.raises(UsageError, match="vocabulary of"):
        shards.check(manifest.vocab_size + 1, "another")
    with pytest.raises(UsageError, match=r"shards.top_k: got 9"):
        Shards(str(tiny.train), top_k=9).check(manifest.vocab_size, manifest.tokenizer)
