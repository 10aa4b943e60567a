"""The format: what is written comes back; what is damaged is named; what is shifted is refused."""

import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data.cache.alignment import check_alignment
from data.cache.manifest import read_manifest
from data.cache.schema import Record, decode, encode
from data.stream.shards import ShardReader, decode_all, read_members
from data.stream.stream import Shards
from kd_core.errors import UsageError
from tests.tiny import Tiny


def _records(tiny: Tiny) -> list[Record]:
    return decode_all(tiny.train / "shard-000000.tar", read_manifest(tiny.train).vocab_size)


def test_a_record_comes_back_as_it_was(tiny: Tiny) -> None:
    record = _records(tiny)[0]
    back = decode(record.name, encode(record), vocab_size=1 << 20, where="here")
    assert vars(back).keys() == vars(record).keys()
    assert all(np.array_equal(vars(back)[name], value) for name, value in vars(record).items())


def test_what_the_teacher_said_sums_to_one_and_is_in_falling_order(tiny: Tiny) -> None:
    for record in _records(tiny):
        mass = np.exp(record.topk_log_probs.astype(np.float64)).sum(1) + np.exp(record.tail_log_prob)
        assert np.abs(mass - 1).max() < 1e-5
        assert (np.diff(record.topk_log_probs, axis=1) <= 0).all()
        assert all(len(set(ids)) == len(ids) for ids in record.topk_token_ids.tolist())


def test_a_smaller_k_moves_what_is_cut_to_the_tail(tiny: Tiny) -> None:
    record = _records(tiny)[0]
    cut = record.with_top_k(3)
    wanted = 1 - np.exp(record.topk_log_probs[:, :3].astype(np.float64)).sum(1)
    assert cut.topk_token_ids.shape[1] == 3
    assert np.abs(np.exp(cut.tail_log_prob) - wanted).max() < 1e-5


def _tokens_outside(record: Record) -> Record:
    ids = record.topk_token_ids.copy()
    ids[0, 0] = 1 << 19
    return replace(record, topk_token_ids=ids)


def _nan(record: Record) -> Record:
    values = record.topk_log_probs.copy()
    values[0, 0] = np.nan
    return replace(record, topk_log_probs=values)


def _too_much_mass(record: Record) -> Record:
    return replace(record, tail_log_prob=record.tail_log_prob * 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_tokens_outside, "outside the vocabulary"), (_nan, "NaN"), (_too_much_mass, "sum to")],
)
def test_impossible_values_are_refused(tiny: Tiny, damage: Callable[[Record], Record], message: str) -> None:
    with pytest.raises(UsageError, match=f"shard-7: record .*{message}"):
        decode("r", encode(damage(_records(tiny)[0])), vocab_size=400, where="shard-7")


def test_a_member_that_unpacks_to_another_size_is_refused_unread(tiny: Tiny) -> None:
    members = encode(_records(tiny)[0])
    members["tail_log_prob.zst"] = zstandard.compress(b"\0" * (1 << 26))
    with pytest.raises(UsageError, match="tail_log_prob.zst: holds 67108864 bytes"):
        decode("r", members, vocab_size=400, where="here")


def test_an_unknown_member_is_refused(tiny: Tiny) -> None:
    members = {**encode(_records(tiny)[0]), "pickle": b"cos\nsystem\n"}
    with pytest.raises(UsageError, match="'pickle'"):
        decode("r", members, vocab_size=400, where="here")


def test_a_shard_is_a_plain_tar(tiny: Tiny) -> None:
    with tarfile.open(tiny.train / "shard-000000.tar") as tar:
        assert all(member.isfile() and member.mtime == 0 for member in tar)


@pytest.mark.parametrize("at", [10, 600, 3000, -2000])
def test_one_flipped_byte_is_found_before_anything_is_read(tiny: Tiny, tmp_path: Path, at: int) -> None:
    shutil.copytree(tiny.train, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-000001.tar"
    payload = bytearray(shard.read_bytes())
    payload[at] ^= 1
    shard.write_bytes(payload)
    reader = ShardReader(tmp_path / "cache", read_manifest(tmp_path / "cache"))
    reader.record(0, 0)
    with pytest.raises(UsageError, match="shard-000001.tar: damaged"):
        reader.record(1, 0)


def test_a_missing_shard_is_named(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.train, tmp_path / "cache")
    (tmp_path / "cache" / "shard-000001.tar").unlink()
    with pytest.raises(UsageError, match="shard-000001.tar: no such shard"):
        ShardReader(tmp_path / "cache", read_manifest(tmp_path / "cache")).record(1, 0)


def test_a_record_that_stands_there_twice_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            for suffix, payload in encode(_records(tiny)[0]).items():
                member = tarfile.TarInfo(f"a.{suffix}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    with pytest.raises(UsageError, match="twice"):
        read_members(path)


def test_an_export_that_has_not_ended_says_so(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UsageError, match="has not ended"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_cache_that_is_one_off_is_refused(tiny: Tiny, shift: int) -> None:
    """Tokens against everything that the teacher said."""
    shifted = [replace(r, token_ids=np.roll(r.token_ids, shift)) for r in _records(tiny)]
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
        for r in _records(tiny)
    ]
    with pytest.raises(UsageError, match="shifted against the teacher"):
        check_alignment(shifted, "cache")


def test_an_aligned_cache_passes_and_another_tokenizer_or_vocabulary_does_not(tiny: Tiny) -> None:
    shards, manifest = Shards(str(tiny.train)), read_manifest(tiny.train)
    shards.check(manifest.vocab_size, manifest.tokenizer)
    with pytest.raises(UsageError, match="written with tokenizer"):
        shards.check(manifest.vocab_size, "another")
    with pytest.raises(UsageError, match="vocabulary of"):
        shards.check(manifest.vocab_size + 1, manifest.tokenizer)
    with pytest.raises(UsageError, match=r"shards.top_k: got 9"):
        Shards(str(tiny.train), top_k=9).check(manifest.vocab_size, manifest.tokenizer)
