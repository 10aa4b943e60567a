"""A cache that grows: new documents in new shards, the old ones untouched, and going on after an interruption."""

import shutil
from pathlib import Path

import pytest
import torch

from data.cache.manifest import read_manifest
from data.export import export as steps
from data.export.claim import claim_growth
from data.export.corpus import Corpus
from data.export.growth import growth_of
from data.export.plan import TeacherExport, make_plans
from data.stream.stream import Shards
from kd_core.errors import UsageError
from tests.tiny import Tiny, make_corpus, write_caches


@pytest.fixture
def grown(tiny: Tiny, tmp_path: Path) -> tuple[Path, TeacherExport, TeacherExport]:
    """A copy of the tiny caches, the export that made them, and one of a corpus with more documents."""
    shutil.copytree(tiny.root / "cache", tmp_path / "cache")
    make_corpus(tmp_path / "corpus", documents=40)
    return tmp_path / "cache", tiny.export(), tiny.export(corpus=Corpus(str(tmp_path / "corpus")))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_new_documents_are_added_and_old_shards_stay(
    tiny: Tiny, grown: tuple[Path, TeacherExport, TeacherExport]
) -> None:
    folder, _, more = grown
    before, old = _files(folder), tiny.records()
    write_caches(more, folder, extend=True)
    after = _files(folder)
    assert {name: after[name] for name in before if "manifest" not in name} == {
        name: payload for name, payload in before.items() if "manifest" not in name
    }
    records, manifest = tiny.records(folder / "train"), read_manifest(folder / "train")
    assert len(manifest.plans) == 2
    assert len({r.name for r in records}) == len(records) == manifest.records > len(old)
    new = {r.document for r in records[len(old) :]}
    held_out = {r.document for r in tiny.records(folder / "validation")}
    assert new | held_out >= {f"{number:03d}.txt" for number in range(24, 40)}
    assert not held_out & {r.document for r in records}
    Shards(str(folder / "train")).check(manifest.vocab_size, manifest.tokenizer)
    mean = sum(float(r.label_log_prob.sum()) for r in records) / sum(r.positions for r in records)
    assert manifest.statistics["teacher_nll"] == pytest.approx(-mean, rel=1e-4)
    write_caches(more, folder, extend=True)
    assert _files(folder) == after, "there was nothing new"


def test_an_interrupted_growth_goes_on_and_ends_with_the_same_bytes(
    grown: tuple[Path, TeacherExport, TeacherExport], tmp_path: Path
) -> None:
    folder, _, more = grown
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    write_caches(more, folder, extend=True)
    assert growth_of(cut, begin=False) == growth_of(cut, begin=False)
    assert not (cut / "growth.json").exists(), "a look leaves nothing behind"
    plans = make_plans(more, cut, growth_of(cut, begin=True))
    model = steps.load_teacher(more, torch.device("cpu"))
    assert not claim_growth(plans[0])
    steps.write_missing_shards(plans[0], model, [], 0, 2)
    assert len(read_manifest(cut / "train").plans) == 1, "the old cache stays valid"
    steps.write_missing_shards(plans[0], model, [], 0, 1)
    steps.finish(plans[0])
    write_caches(more, cut, extend=True)
    assert _files(cut) == _files(folder)


def test_a_growth_with_other_settings_is_refused(grown: tuple[Path, TeacherExport, TeacherExport]) -> None:
    folder, export, more = grown
    with pytest.raises(UsageError, match="was exported with another row_length"):
        write_caches(TeacherExport(**{**vars(more), "row_length": 16}), folder, extend=True)
    with pytest.raises(UsageError, match="add documents that are new to it with --extend"):
        write_caches(more, folder)
    write_caches(export, folder)


def test_a_shard_lost_from_a_grown_cache_does_not_cost_what_was_added(
    grown: tuple[Path, TeacherExport, TeacherExport],
) -> None:
    folder, export, more = grown
    write_caches(more, folder, extend=True)
    (folder / "train" / "shard-000000.tar").unlink()
    with pytest.raises(UsageError, match="shard-000000.tar: no such shard, in a cache that has grown"):
        write_caches(export, folder)
    assert len(read_manifest(folder / "train").plans) == 2
