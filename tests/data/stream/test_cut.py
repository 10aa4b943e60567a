"""Less is read of a cache than it holds, exactly as if it had been written so."""

from pathlib import Path

import numpy as np
import pytest

from data.cache.record import UNUSED, Record
from data.cache.selection import Selection
from data.stream.readers import Readers
from data.stream.source import Shards
from tests.tiny import ROW_LENGTH, Tiny, write_caches

STORED = Selection(top_k=12, tail_temperatures=(2.0,))
CUTS = [{"top_k": 5}, {"min_prob": 0.02}, {"mass": 0.9}, {"top_k": 9, "min_prob": 0.01, "mass": 0.97}]


@pytest.fixture(scope="module")
def stored(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    write_caches(tiny.export(selection=STORED, codec="lossless"), folder)
    return folder / "train"


def _records(shards: Shards) -> dict[tuple[str, int], Record]:
    order, found = shards.order(ROW_LENGTH, None), dict[tuple[str, int], Record]()
    readers = Readers(shards, order)
    for number in range(order.rows):
        records, _ = readers.read(order.row(order.place(number)))
        found |= {(record.document, record.start): record for record in records}
    return found


def _by_id(record: Record) -> list[dict[int, float]]:
    return [
        {i: p for i, p in zip(ids, logs, strict=True) if p > UNUSED}
        for ids, logs in zip(record.topk_token_ids.tolist(), record.topk_log_probs.tolist(), strict=True)
    ]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_cut_is_what_a_narrower_selection_writes(
    tiny: Tiny, stored: Path, tmp_path: Path, cut: dict[str, float]
) -> None:
    narrow = Selection(**{"top_k": 12, "tail_temperatures": (2.0,), **cut})  # type: ignore[arg-type]
    write_caches(tiny.export(selection=narrow, codec="lossless"), tmp_path)
    found, wanted = _records(Shards(str(stored), **cut)), _records(Shards(str(tmp_path / "train")))  # type: ignore[arg-type]
    assert found.keys() == wanted.keys()
    for place, record in found.items():
        for ours, theirs in zip(_by_id(record), _by_id(wanted[place]), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(abs(ours[i] - theirs[i]) <= 1e-6 for i in ours)
        assert np.abs(np.exp(record.tail_log_prob) - np.exp(wanted[place].tail_log_prob)).max() <= 1e-6
        tails = (each.tempered_tails[2.0] for each in (record, wanted[place]))
        np.testing.assert_allclose(*tails, rtol=1e-5, atol=1e-5)


def test_nothing_is_done_where_nothing_is_cut(stored: Path) -> None:
    shards = Shards(str(stored))
    record = next(shards.reader().records())
    assert shards.cut(record) is record
