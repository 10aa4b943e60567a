"""A reader written from the document alone reads the same, bit for bit, of every kind of cache."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from data.cache.codec.levels import STEPS, Levels
from data.cache.manifest import read_manifest
from data.cache.record import UNUSED
from data.stream.shards import read_tables
from tests.data.cache.kinds import KINDS
from tests.reference.cache_reader import levels, read_cache
from tests.tiny import Tiny, write_caches


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_readers_agree(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *, lists: bool
) -> None:
    selection, codec = KINDS[kind]
    if lists:  # else the cache is too small to carry any
        monkeypatch.setattr("data.cache.codec.rank_tables.POSITIONS_PER_LIST", 50)
    write_caches(tiny.export(selection=selection, codec=codec), tmp_path)
    assert bool(len(read_tables(tmp_path / "train", read_manifest(tmp_path / "train").tables).tokens)) == lists
    ours, theirs = tiny.records(tmp_path / "train"), list(read_cache(tmp_path / "train"))
    assert len(ours) == len(theirs) > 0
    for record, other in zip(ours, theirs, strict=True):
        assert (record.name, record.document, record.start) == (other["name"], other["document"], other["start"])
        assert record.token_ids.tolist() == other["token_ids"]
        assert record.loss_mask.tolist() == other["loss_mask"].tolist()
        used = record.topk_log_probs > UNUSED
        mine = [ids[mask].tolist() for ids, mask in zip(record.topk_token_ids, used, strict=True)]
        assert mine == other["ids"]
        assert np.array_equal(record.topk_log_probs[used], other["head"][other["head"] > UNUSED])
        assert np.array_equal(record.tail_log_prob, other["tail"])
        assert np.array_equal(record.label_log_prob, other["labels"])
        assert record.tempered_tails.keys() == other["tempered"].keys()
        assert all(np.array_equal(tail, other["tempered"][t]) for t, tail in record.tempered_tails.items())
        assert (record.sampled_token_ids is None) == (other["samples"] is None)
        if other["samples"] is not None:
            for (ids, logs), (ids_there, logs_there) in [(record.samples(), other["samples"])]:
                assert np.array_equal(ids[logs > UNUSED], ids_there[logs_there > UNUSED])
                assert np.array_equal(logs[logs > UNUSED], logs_there[logs_there > UNUSED])


@pytest.mark.parametrize("codec", STEPS)
def test_the_levels_are_those_of_the_document(codec: str) -> None:
    table = levels(STEPS[codec])
    assert np.array_equal(table, Levels(STEPS[codec]).log_probs)
    digest = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    text = (Path(__file__).parents[3] / "data" / "README.md").read_text()
    assert f"| `{codec}` | {STEPS[codec]} | {len(table)} | `{digest[:16]}…` |" in text
