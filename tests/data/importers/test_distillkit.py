"""DistillKit's rows: decoded to the bit as its own code decodes them, and its packed rows as records.

`distillkit_rows.json` was written by its own functions: compressed and decompressed values of both codecs.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.cache.record import UNUSED
from data.importers.formats.distillkit_codec import CurveCodec, LegacyCodec, parse_codec, read_codec
from data.importers.formats.formats import read_lines_of
from data.importers.parsed_entries import Line
from data.importers.settings import UNKNOWN, ImportSettings
from kd_core.errors import UsageError
from tests.data.importers.sources import distillkit_bytes, distillkit_config

ROWS: dict[str, Any] = json.loads((Path(__file__).parent / "distillkit_rows.json").read_text())
T, K = ROWS["positions"], ROWS["k"]
IDS = np.array(ROWS["ids"])
VALUES = np.frombuffer(base64.b64decode(ROWS["values"]), np.float32).reshape(T, K)
V = 300


def _bytes(row: dict[str, Any], name: str, dtype: Any = np.uint8) -> np.ndarray:
    return np.frombuffer(base64.b64decode(row[name]), dtype).reshape(T, -1)


@pytest.mark.parametrize("name", ROWS["today"])
def test_todays_codec_decodes_as_its_own_code(name: str) -> None:
    row = ROWS["today"][name]
    codec = parse_codec(row["config"])
    assert isinstance(codec, CurveCodec)
    decoded = codec.decode(_bytes(row, "compressed_logprobs"))
    assert decoded.tobytes() == _bytes(row, "decoded", np.float32).tobytes()
    assert codec.ids(_bytes(row, "bytepacked_indices")).tolist() == IDS.tolist()
    # Its own error, which the conversion takes over: up to 0.2 nats of an entry with these settings.
    assert np.abs(decoded - VALUES).max() < 0.2


@pytest.mark.parametrize("name", ROWS["legacy"])
def test_the_legacy_codec_decodes_as_its_own_code(name: str) -> None:
    row = ROWS["legacy"][name]
    codec = parse_codec({"legacy_logit_compression": row["config"]})
    assert isinstance(codec, LegacyCodec)
    decoded = codec.decode(_bytes(row, "exact_values", np.float32), _bytes(row, "coeffs", np.float32))
    assert decoded.tobytes() == _bytes(row, "decoded", np.float32).tobytes()
    assert codec.ids(np.array(row["packed_indices"], np.int64)).tolist() == row["ids"]


def _write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def _read(path: Path, **settings: Any) -> list[Line]:
    return list(read_lines_of(ImportSettings("distillkit", str(path), V, UNKNOWN, **settings)))


def _row(name: str = "recommended", **fields: Any) -> dict[str, Any]:
    row = ROWS["today"][name]
    names = ("compressed_logprobs", "bytepacked_indices")
    return {"input_ids": [7, 8, 9], **{field: _bytes(row, field).tolist() for field in names}, **fields}


@pytest.mark.parametrize("nested", [False, True])
def test_the_configuration_beside_a_capture_or_of_a_training_is_read(tmp_path: Path, nested: bool) -> None:
    config = ROWS["today"]["recommended"]["config"]
    text = json.dumps({"teacher": {"kind": "dataset", "logprob_compressor": config}} if nested else config)
    source = _write(tmp_path / "data_0.parquet", [_row()])
    (tmp_path / ("training.yml" if nested else "compression_config.yaml")).write_text(text)
    (line,) = _read(tmp_path, compression=str(tmp_path / "training.yml") if nested else "")
    decoded = _bytes(ROWS["today"]["recommended"], "decoded", np.float32)[:2].astype(np.float64)
    found = np.take_along_axis(_dense(line), IDS[:2], 1)
    scaled = decoded - np.log(np.maximum(1, np.exp(decoded).sum(axis=1)))[:, None]
    assert np.abs(found - scaled).max() < 1e-6
    assert line.record.token_ids.tolist() == [7, 8, 9]
    assert np.allclose(np.exp(line.record.tail_log_prob), 1 - np.exp(scaled).sum(axis=1), atol=1e-6)
    assert source.exists()


def _dense(line: Line) -> np.ndarray:
    record = line.record
    dense = np.full((record.positions, V), UNUSED)
    np.put_along_axis(dense, record.topk_token_ids, record.topk_log_probs, 1)
    return dense


def test_rows_without_compression_are_renormalised_unless_they_are_said_to_be_log_probabilities(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2], "token_ids": [[2, 5], [1, 2]], "top_values": [[-0.5, -2.0], [-1.0, -9.0]]}]
    source = _write(tmp_path / "a.parquet", rows)
    (line,) = _read(source)
    assert line.unknown == {"tail"}
    assert np.exp(line.record.topk_log_probs).sum(axis=1) == pytest.approx(1)
    (line,) = _read(source, values="log_probs")
    assert line.unknown == set()
    assert line.record.topk_log_probs[0].tolist() == [-0.5, -2.0]


def test_packed_rows_become_a_record_for_each_text(tmp_path: Path) -> None:
    """As `distillkit-pack-logits` leaves them: texts end to end, numbered in the mask, each without its last token."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(9, V)) * 3
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logs, axis=1)[:, :8]
    top = np.take_along_axis(logs, ids, 1).astype(np.float32)
    packed, values = distillkit_bytes(ids, top, V)
    row = {
        "input_ids": random.integers(0, V, 9).tolist(), "attention_mask": [1, 1, 1, 2, 2, 2, 2, 3, 0],
        "labels": [-100, 1, 2, *[-100] * 6], "compressed_logprobs": values.tolist(),
        "bytepacked_indices": packed.tolist(),
    }  # fmt: skip
    row["labels"][1:3] = row["input_ids"][1:3]
    (tmp_path / "compression_config.yaml").write_text(json.dumps(distillkit_config(V, 8)))
    _write(tmp_path / "a.parquet", [row])
    lines = _read(tmp_path)
    assert [line.record.document for line in lines] == ["a.parquet:1/0", "a.parquet:1/1"]  # the third has one token
    assert [line.record.token_ids.tolist() for line in lines] == [row["input_ids"][:3], row["input_ids"][3:7]]
    assert [line.record.loss_mask.tolist() for line in lines] == [[1, 1], [0, 0, 0]]
    # Positions of the second text are rows 3 to 5 of the packed row.
    assert lines[1].record.topk_token_ids.tolist() == ids[3:6].tolist()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(json.dumps(ROWS["today"]["published"]["config"]))
    named = {"compression": str(tmp_path / "config.yml")}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (_row(), {}, "no compression_config.yaml lies beside them"),
        (_row(), named, r"a.parquet:1: compressed_logprobs: \[3, 32\] bytes; by its configuration a position has 44"),
        (_row("published", input_ids=[1, 2]), named, "has 3 rows of ids and 3 of numbers for 2 tokens"),
        (_row("published", input_ids=[1, 2, V]), named, "input_ids: ids 1 to 300; the vocabulary has 300"),
        (_row("published", attention_mask=[1, 1]), named, "attention_mask: 2 of int64 for 3 tokens; wanted whole"),
        (_row("published", labels=[7, 8, 1]), named, "labels: wanted those of input_ids"),
        ({"input_ids": [1, 2], "packed_indices": [[1], [2]], "exact_values": [[1.0], [1.0]], "coeffs": [[], []]},
         named, "no legacy_logit_compression for them"),
        ({"input_ids": [1, 2, 3], "top_values": [[1.0], [1.0, 2.0]], "token_ids": [[3], [3, 4]]}, {},
         "token_ids: wanted a list of equally many numbers"),
        ({"input_ids": [1, 2], "top_values": [[1.0, 2.0]], "token_ids": [[3, 3]]}, {}, "position 0: an id twice"),
    ]  # fmt: skip
    for row, settings, message in cases:
        _write(tmp_path / "a.parquet", [row])
        with pytest.raises(UsageError, match=message):
            _read(tmp_path / "a.parquet", **settings)
    for text, message in {
        "k: [": "while parsing",
        "[1, 2]": "wanted an object",
        "d: 5": "missing 2 required",
        "{d: 5, k: 2, exact_k: 3}": "fit each other",
        "{d: 5, k: 2, exact_k: 1, residual_bins: []}": "fit each other",
        "{d: 5, k: 2, exact_k: 1, twice: 1}": "no such field",
        "{d: 5, k: 2, exact_k: 2, exact_dtype: int8}": "float16",
        "{d: 5, k: 1e9, exact_k: 2}": "whole number",
    }.items():
        (tmp_path / "config.yml").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_codec(tmp_path / "config.yml")
