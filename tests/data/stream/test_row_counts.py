"""Counts of rows that are kept in the user's cache folder: found again, and never believed when they do not fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.cache.manifest import Manifest, read_manifest
from data.stream import row_counts
from data.stream.order import CacheOrder
from data.stream.row_counts import count_rows, counts_file
from kd_core.errors import UsageError
from tests.tiny import ROW_LENGTH, Tiny


@pytest.fixture
def manifest(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A cache that counts as large, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(row_counts, "KEPT_FROM", 1)
    return read_manifest(tiny.train)


def test_counts_are_made_once(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    _, counts = count_rows(manifest, ROW_LENGTH)
    assert counts_file(manifest, ROW_LENGTH).is_file()
    _, longer = count_rows(manifest, 2 * ROW_LENGTH)
    monkeypatch.delattr(row_counts, "_count")
    assert np.array_equal(count_rows(manifest, ROW_LENGTH)[1], counts)
    assert np.array_equal(count_rows(manifest, 2 * ROW_LENGTH)[1], longer)
    assert longer.sum() < counts.sum()
    with pytest.raises(NameError, match="_count"):
        count_rows(replace(manifest, tokenizer="another"), ROW_LENGTH)
    assert len(list(counts_file(manifest, ROW_LENGTH).parent.iterdir())) == 2, "nothing half-written stays"


def _zeros(data: bytes) -> bytes:
    import hashlib  # noqa: PLC0415

    payload = bytes(len(data) - 32)
    return hashlib.sha256(payload).digest() + payload


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b + b"0", lambda b: b[:-4] + b"\7\0\0\0", lambda _: b"", _zeros]
)
def test_a_file_that_does_not_fit_is_made_anew(manifest: Manifest, damage: object) -> None:
    _, counts = count_rows(manifest, ROW_LENGTH)
    path = counts_file(manifest, ROW_LENGTH)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))  # type: ignore[operator]
    assert np.array_equal(count_rows(manifest, ROW_LENGTH)[1], counts)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert count_rows(manifest, ROW_LENGTH)[1].sum() > 0


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    row_counts._write(tmp_path / "rows" / "counts", np.ones(3, np.int64))
    assert not list((tmp_path / "rows").iterdir())


def test_counts_that_are_plausible_and_wrong_are_named(manifest: Manifest) -> None:
    segments, counts = count_rows(manifest, ROW_LENGTH)
    order = CacheOrder(manifest.lengths, segments, counts + 1, ROW_LENGTH, 0)
    with pytest.raises(UsageError, match=r"were counted. Delete the folder kd-workspace/rows"):
        order.row(order.place(0))
