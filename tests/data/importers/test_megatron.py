"""Megatron-LM's tars of offline logits, made as its source (`logits_saver.py`) makes them, in both versions."""

import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from data.cache.record import UNUSED
from data.importers.formats.formats import read_lines_of
from data.importers.parsed_entries import Line
from data.importers.settings import UNKNOWN, ImportSettings
from kd_core.errors import UsageError
from tests.data.importers.sources import megatron_tars

V, T, K, SAMPLES = 100_000, 5, 4, 16  # ids above 65,535 have their 17th bit set


def _teacher(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [samples, T + 1], and ids and log-probabilities [samples, T, K] of a made-up teacher."""
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((SAMPLES, T, 60)), axis=2)[:, :, :K] * (V // 60)
    logs = -np.sort(random.exponential(2.0, (SAMPLES, T, K)), axis=2) - 1.5
    return random.integers(0, V, (SAMPLES, T + 1)), ids, logs


def _job(folder: Path, tokens: np.ndarray, mask: np.ndarray | None = None, **settings: Any) -> ImportSettings:
    np.save(folder / "tokens.npy", tokens)
    if mask is not None:
        np.save(folder / "mask.npy", mask)
        settings["loss_mask"] = str(folder / "mask.npy")
    return ImportSettings("megatron", str(folder), V, UNKNOWN, tokens=str(folder / "tokens.npy"), **settings)


def _by_sample(lines: list[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: line.record.document)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("batches", [(1, 1, 4), (2, 2, 2), (4, 1, 1)])
def test_each_sample_gets_its_own_tokens(tmp_path: Path, version: int, batches: tuple[int, int, int]) -> None:
    tokens, ids, logs = _teacher()
    megatron_tars(tmp_path, ids, logs, version=version, dtype=torch.float32, batches=batches)
    mask = np.random.default_rng(1).integers(0, 2, (SAMPLES, T))
    lines = list(read_lines_of(_job(tmp_path, tokens, mask)))
    # Iterations come in their order. Within one, each rank has its own samples.
    each = np.prod(batches)
    assert [int(line.record.document[7:]) // each for line in lines] == [i // each for i in range(SAMPLES)]
    for sample, line in enumerate(_by_sample(lines)):
        record = line.record
        assert record.document == f"sample-{sample:08d}"
        assert record.token_ids.tolist() == tokens[sample].tolist()
        assert record.loss_mask.tolist() == mask[sample].tolist()
        assert record.topk_token_ids.tolist() == ids[sample].tolist()
        assert np.abs(record.topk_log_probs - logs[sample]).max() < 1e-6
        assert np.allclose(np.exp(record.tail_log_prob), 1 - np.exp(logs[sample]).sum(axis=1), atol=1e-6)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 0.004), (torch.bfloat16, 0.04)])
def test_the_error_of_its_dtypes(tmp_path: Path, dtype: torch.dtype, most: float) -> None:
    tokens, ids, logs = _teacher()
    megatron_tars(tmp_path, ids, logs, version=2, dtype=dtype)
    errors = [
        np.abs(line.record.topk_log_probs - logs[sample]).max()
        for sample, line in enumerate(_by_sample(list(read_lines_of(_job(tmp_path, tokens)))))
    ]
    assert most / 20 < max(errors) < most


@pytest.mark.parametrize("version", [1, 2])
def test_entries_that_a_nucleus_left_out_are_not_used(tmp_path: Path, version: int) -> None:
    tokens, ids, logs = _teacher()
    kept = np.random.default_rng(2).integers(1, K + 1, (SAMPLES, T))
    logs = np.where(np.arange(K) < kept[:, :, None], logs, UNUSED)
    megatron_tars(tmp_path, ids, logs, version=version)
    for sample, line in enumerate(_by_sample(list(read_lines_of(_job(tmp_path, tokens))))):
        assert (line.record.topk_log_probs > UNUSED).sum(axis=1).tolist() == kept[sample].tolist()


def test_packed_texts_become_records_of_their_own(tmp_path: Path) -> None:
    """Boundaries are padded by repeating the last one. The last position of a text has no label of its own."""
    tokens, ids, logs = _teacher()
    megatron_tars(tmp_path, ids, logs, version=2, edges=[[0, 2, 5, 5]] * SAMPLES)
    lines = _by_sample(list(read_lines_of(_job(tmp_path, tokens))))
    assert len(lines) == 2 * SAMPLES
    for sample in range(SAMPLES):
        first, second = (line.record for line in lines[2 * sample : 2 * sample + 2])
        assert first.token_ids.tolist() == tokens[sample, :2].tolist()
        assert second.token_ids.tolist() == tokens[sample, 2:].tolist()
        assert first.topk_token_ids.tolist() == ids[sample, :1].tolist()
        assert second.topk_token_ids.tolist() == ids[sample, 2:].tolist()


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    tokens, ids, logs = _teacher()
    root, tmp_path = tmp_path, tmp_path / "tars"
    megatron_tars(tmp_path, ids, logs, version=2)
    with pytest.raises(UsageError, match=r"--tokens: Megatron-LM's tars hold no tokens\. Wanted an \.npy of \[samples"):
        list(read_lines_of(ImportSettings("megatron", str(tmp_path), V, UNKNOWN)))
    for wrong, message in ((tokens[:8], "sample 8 of 5 positions; --tokens has"), (tokens[:, 1:], "sample 0 of 5")):
        folder = root / f"copy_{len(wrong)}"
        megatron_tars(folder, ids, logs, version=2)
        with pytest.raises(UsageError, match=message):
            list(read_lines_of(_job(folder, wrong)))
    job = _job(tmp_path, tokens)
    (tmp_path / "dp1__0-16.tar").rename(tmp_path / "dp0__0-15.tar")
    with pytest.raises(UsageError, match=r"no tar of rank 1 of 2, dp1__…"):
        list(read_lines_of(job))
    (tmp_path / "dp0__0-15.tar").rename(tmp_path / "dp1__0-16.tar")
    (tmp_path / "dp0__0-15.tar").write_bytes((tmp_path / "dp0__0-16.tar").read_bytes())
    with pytest.raises(UsageError, match="holds samples of another tar too"):
        list(read_lines_of(job))
    (tmp_path / "dp0__0-15.tar").rename(tmp_path / "cp1_dp0__3.tar")
    with pytest.raises(UsageError, match="of context-parallel rank 1"):
        list(read_lines_of(job))
    with pytest.raises(UsageError, match="--values: megatron says itself"):
        list(read_lines_of(_job(tmp_path, tokens, values="logits")))


def _payloads(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member)) for member in tar]
        return [(name, file.read()) for name, file in members if file]


def _rewrite(path: Path, payloads: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in payloads:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def _without(path: Path, number: int) -> None:
    """Takes a member out of a tar."""
    payloads = _payloads(path)
    del payloads[number]
    _rewrite(path, payloads)


def _set_first_value(member: dict[str, Any], value: float) -> None:
    values = member["values"][0] if isinstance(member["values"], list) else member["values"]
    values[0, 0, 0] = value


def _drop_sample(member: dict[str, Any]) -> None:
    values, lower = (member[name][:, 1:].clone() for name in ("values", "indices_low"))
    member.update(values=values, indices_low=lower, bit_17=torch.zeros(values.shape, dtype=torch.bool))


class _Other:
    """Something else than a tensor."""


MEMBERS: dict[str, tuple[int, Callable[[dict[str, Any]], object], str]] = {
    "NaN": (2, lambda m: _set_first_value(m, float("nan")), "values: an entry is not a number"),
    "NaN in version 1": (1, lambda m: _set_first_value(m, float("nan")), "values: an entry is not a number"),
    "a sample less": (2, _drop_sample, "values: 3 samples .*; wanted 4"),
    "ids as floats": (2, lambda m: m.update(indices_low=m["indices_low"].float()), "indices_low: float32; wanted int"),
    "another version": (2, lambda m: m.update({name: [m[name]] for name in m}), "values: of another format version"),
    "another version than 1": (1, lambda m: m.update(values=m["values"][0]), "values: of another format version"),
    "no tensors": (2, lambda m: m.update(values=_Other()), "it holds something else than a dict of tensors"),
}


@pytest.mark.parametrize("damage", MEMBERS)
def test_a_member_that_is_not_whole_is_named(tmp_path: Path, damage: str) -> None:
    version, change, message = MEMBERS[damage]
    tokens, ids, logs = _teacher()
    megatron_tars(tmp_path, ids, logs, version=version)
    path = tmp_path / ("cp0_dp1__1.tar" if version == 1 else "dp1__0-16.tar")
    (meta, (name, payload), *others) = _payloads(path)
    member = torch.load(io.BytesIO(zstandard.decompress(payload)), weights_only=True)
    change(member)
    buffer = io.BytesIO()
    torch.save(member, buffer)
    _rewrite(path, [meta, (name, zstandard.compress(buffer.getvalue())), *others])
    with pytest.raises(UsageError, match=message) as error:
        list(read_lines_of(_job(tmp_path, tokens)))
    assert path.name in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dp_size_save": 1}, "of rank 1; its _meta.json counts 1 ranks"),
        ({"dp_size_save": 2, "mbs_save": 1}, "is of another run than that of .*dp0__0-16"),
        ({"format_version": 3}, "format_version: 3; wanted a whole number from 1 to 2"),
    ],
)
def test_tars_of_two_runs_or_of_a_newer_version_are_refused(
    tmp_path: Path, fields: dict[str, int], message: str
) -> None:
    tokens, ids, logs = _teacher()
    megatron_tars(tmp_path, ids, logs, version=2)
    path = tmp_path / "dp1__0-16.tar"
    ((name, meta), *members) = _payloads(path)
    saver = json.loads(meta)["saver"]
    _rewrite(path, [(name, json.dumps({"saver": {**saver, **fields}}).encode()), *members])
    with pytest.raises(UsageError, match=message):
        list(read_lines_of(_job(tmp_path, tokens)))


@pytest.mark.parametrize(("version", "unit", "size"), [(1, "iterations", 1), (2, "samples", 4)])
def test_missing_samples_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: int, unit: str, size: int
) -> None:
    tokens, ids, logs = _teacher()
    names = ["cp0_dp0__3.tar", "cp0_dp1__3.tar"] if version == 1 else ["dp0__0-16.tar", "dp1__0-16.tar"]
    # A gap in one rank or in both, the last member, and the first one.
    for case, (cut, number, first, rank) in enumerate([(1, 2, 1, 1), (2, 2, 1, 0), (1, 4, 3, 1), (1, 1, 0, 1)]):
        folder = tmp_path / str(case)
        megatron_tars(folder, ids, logs, version=version, batches=(2, 1, 2))
        for name in names[-cut:]:
            _without(folder / name, number)
        message = f"{unit} {first * size} to {(first + 1) * size} of rank {rank} are missing"
        with pytest.raises(UsageError, match=message):
            list(read_lines_of(_job(folder, tokens)))
    folder = tmp_path / "late"
    megatron_tars(folder, ids, logs, version=version, batches=(2, 1, 2))
    for name in names:
        _without(folder / name, 1)
    with caplog.at_level(logging.INFO):
        assert len(list(read_lines_of(_job(folder, tokens)))) == SAMPLES - 4
    assert f"begins with {unit} {size}" in caplog.text
    with tarfile.open(folder / names[0]) as tar:
        end = tar.getmembers()[-1].offset
    (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:end])
    with pytest.raises(UsageError, match=rf"{names[0]}: .*ends before the mark of its end.* Copy it again"):
        list(read_lines_of(_job(folder, tokens)))
