"""A cache that grows: new documents in new shards, the old ones untouched, and going on after an interruption."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.cache.inspection.verify import verify
from data.cache.manifest import Shard, read_manifest
from data.corpus.corpus import Corpus
from data.export import export as steps
from data.export.extend import load_growth
from data.export.plan import make_plans
from data.export.receipts import write_manifest
from data.export.resume_check import record_or_check_growth
from data.export.teacher_export import TeacherExport
from data.stream.stream import Shards
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from tests.tiny import Tiny, bytes_of, make_corpus, write_caches


@pytest.fixture
def grown(tiny: Tiny, tmp_path: Path) -> tuple[Path, TeacherExport, TeacherExport]:
    """A copy of the tiny caches, the export that made them, and one of a corpus with more documents."""
    shutil.copytree(tiny.root / "cache", tmp_path / "cache")
    make_corpus(tmp_path / "corpus", documents=40)
    return tmp_path / "cache", tiny.export(), tiny.export(corpus=Corpus(str(tmp_path / "corpus")))


def test_new_documents_are_added_and_old_shards_stay(
    tiny: Tiny, grown: tuple[Path, TeacherExport, TeacherExport]
) -> None:
    folder, _, more = grown
    before, old = bytes_of(folder), tiny.records()
    write_caches(more, folder, extend=True)
    after = bytes_of(folder)
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
    assert bytes_of(folder) == after, "there was nothing new"


def test_an_interrupted_growth_goes_on_and_ends_with_the_same_bytes(
    grown: tuple[Path, TeacherExport, TeacherExport], tmp_path: Path
) -> None:
    folder, _, more = grown
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    write_caches(more, folder, extend=True)
    assert load_growth(cut, begin=False).manifests == load_growth(cut, begin=False).manifests
    assert not (cut / "growth.json").exists(), "a look leaves nothing behind"
    plans = make_plans(more, cut, load_growth(cut, begin=True))
    model = steps.load_teacher(more, torch.device("cpu"))
    assert not record_or_check_growth(plans[0])
    steps.write_missing_shards(plans[0], model, [], 0, 2)
    assert len(read_manifest(cut / "train").plans) == 1, "the old cache stays valid"
    steps.write_missing_shards(plans[0], model, [], 0, 1)
    write_manifest(plans[0])
    write_caches(more, cut, extend=True)
    assert bytes_of(cut) == bytes_of(folder)


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
    with pytest.raises(UsageError, match="shard-000000.tar: no such file, in a cache that has grown"):
        write_caches(export, folder)
    assert len(read_manifest(folder / "train").plans) == 2


def _lines(path: Path, lines: list[str]) -> Corpus:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return Corpus(str(path))


def _texts(tiny: Tiny, folder: Path) -> dict[str, list[str]]:
    """Every document's text by split; these documents are one window each."""
    words = Tokenizer(tiny.teacher)
    return {
        split: sorted(words.decode(record.token_ids.tolist()) for record in tiny.records(folder / split))
        for split in ("train", "validation")
    }


def test_documents_are_known_by_their_content(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = [f"The old fox sees a river {i}." for i in range(8)]
    new = [f"The young hen follows another light {i}." for i in range(4)]
    path, out = tmp_path / "data.jsonl", tmp_path / "out"
    write_caches(tiny.export(corpus=_lines(path, old)), out)
    # The same lines in another order, one of them twice, and behind and between them new ones, two of them alike.
    lines = [new[0], *reversed(old), old[3], *new[1:], new[2]]
    export = tiny.export(corpus=_lines(path, lines))
    with caplog.at_level("INFO", logger="kd"):
        write_caches(export, out, extend=True)
    assert "4 of 14 documents are new" in caplog.text
    assert "1 of the new documents have the names of documents in the cache whose content differs" in caplog.text
    found = _texts(tiny, out)
    assert sorted([*found["train"], *found["validation"]]) == sorted([*old, *new])
    for split in ("train", "validation"):
        assert not verify(out / split, lambda _: None).problems
    # Once more, from a file of another name.
    path.rename(tmp_path / "renamed.jsonl")
    before = bytes_of(out)
    write_caches(tiny.export(corpus=Corpus(str(tmp_path / "renamed.jsonl"))), out, extend=True)
    assert bytes_of(out) == before


def test_a_continued_document_stays_on_its_side_and_no_window_stands_twice(tiny: Tiny, tmp_path: Path) -> None:
    old = [" ".join(f"The old fox sees a river {i} and a road {j}." for j in range(9)) for i in range(10)]
    out, path = tmp_path / "out", tmp_path / "data.jsonl"
    write_caches(tiny.export(corpus=_lines(path, old)), out)
    longer = [f"{text} The owl hears a new light." for text in old]
    write_caches(tiny.export(corpus=_lines(path, [*longer, "A new hen.", "Another new hen."])), out, extend=True)
    windows = {
        split: [(record.start, tuple(record.token_ids.tolist())) for record in tiny.records(out / split)]
        for split in ("train", "validation")
    }
    every = windows["train"] + windows["validation"]
    assert len(set(every)) == len(every)
    words = Tokenizer(tiny.teacher)
    fresh = {ids: split for split, found in windows.items() for _, ids in found if "light" in words.decode(ids)}
    assert len(fresh) == len(old), "the end of each document is there"
    named = {split: {record.document for record in tiny.records(out / split) if record.start} for split in windows}
    assert named["validation"]
    assert not named["train"] & named["validation"]
    before = bytes_of(out)
    write_caches(tiny.export(corpus=_lines(path, [*longer, "A new hen.", "Another new hen."])), out, extend=True)
    assert bytes_of(out) == before


def test_a_document_is_continued_behind_a_full_window(tiny: Tiny, tmp_path: Path) -> None:
    # Each document ends where its second window does.
    length = 2 * tiny.export().row_length
    ids = [[(i + 2) * j % 311 for j in range(length + 1)] for i in range(3)]
    out, path = tmp_path / "out", tmp_path / "data.jsonl"

    def export() -> TeacherExport:
        path.write_text("\n".join(json.dumps({"tokens": row, "name": f"row {i}"}) for i, row in enumerate(ids)))
        return tiny.export(corpus=Corpus(str(path)), train_tokens=None, validation_tokens=None)

    write_caches(export(), out)
    ids = [[*row, *range(9)] for row in ids]
    write_caches(export(), out, extend=True)
    records = [record for split in ("train", "validation") for record in tiny.records(out / split)]
    last = {record.document: record.token_ids.tolist() for record in records}
    assert last == {f"row {i}": row[length:] for i, row in enumerate(ids)}
    assert len(records) == 9
    before = bytes_of(out)
    write_caches(export(), out, extend=True)
    assert bytes_of(out) == before


def test_verify_finds_held_out_documents_in_train_other_windows_and_other_masks(tiny: Tiny, tmp_path: Path) -> None:
    texts = [f"The old fox sees a river {i}." for i in range(8)]
    write_caches(tiny.export(corpus=_lines(tmp_path / "a.jsonl", texts)), tmp_path / "out")
    held_out, *_ = _texts(tiny, tmp_path / "out")["validation"]
    other = tiny.export(corpus=_lines(tmp_path / "b.jsonl", [held_out, "The old owl.", "A young hen sees."]), seed=3)
    write_caches(other, tmp_path / "other")
    assert held_out in _texts(tiny, tmp_path / "other")["train"]
    shutil.copytree(tmp_path / "out" / "validation", tmp_path / "other" / "validation", dirs_exist_ok=True)
    (problem,) = verify(tmp_path / "other" / "train", lambda _: None).problems
    assert problem.startswith("../validation: 1 of its documents are in train, too")
    path = tmp_path / "other" / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["plans"][0]["windows"]["sha256"] = manifest["plans"][0]["windows_masks"] = "0" * 64
    path.write_text(json.dumps(manifest))
    found = verify(path.parent, lambda _: None).problems
    assert "manifest.json: plan 0: the records are not those of its windows" in found
    assert "manifest.json: plan 0: the records score other labels than its loss masks" in found


class _CountedTuple(tuple[Shard, ...]):
    passes = 0

    def __iter__(self) -> Iterator[Shard]:
        _CountedTuple.passes += 1
        return super().__iter__()


def test_the_manifest_of_a_growth_takes_time_linear_in_its_shards(
    grown: tuple[Path, TeacherExport, TeacherExport],
) -> None:
    folder, _, more = grown
    growth = load_growth(folder, begin=True)
    counted = {split: replace(m, shards=_CountedTuple(m.shards)) for split, m in growth.manifests.items()}
    plan, _ = make_plans(more, folder, replace(growth, manifests=counted))
    assert not record_or_check_growth(plan)
    steps.write_missing_shards(plan, steps.load_teacher(more, torch.device("cpu")), [], 0, 1)
    _CountedTuple.passes = 0
    write_manifest(plan)
    assert len(counted["train"].shards) == 3
    assert _CountedTuple.passes <= 2


@pytest.mark.parametrize("head_bytes", [1 << 24, 1])
def test_equal_tokens_behind_another_prompt_of_the_teacher_are_new(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_bytes: int
) -> None:
    """A long corpus is decided document by document (`HEAD_BYTES`)."""
    monkeypatch.setattr("data.export.spool.planning.HEAD_BYTES", head_bytes)
    out, path = tmp_path / "out", tmp_path / "a.jsonl"

    def export(*prompts: str | None) -> TeacherExport:
        rows = [{"prompt": f"The fox {i}. ", "completion": "The old owl."} for i in range(12)]
        rows = [row | ({"teacher_prompt": prompt} if prompt else {}) for prompt in prompts for row in rows]
        path.write_text("\n".join(map(json.dumps, rows)))
        return tiny.export(corpus=Corpus(str(path)))

    write_caches(export("The hen. "), out)
    write_caches(export("The hen. ", "A river. ", None), out, extend=True)
    splits = [tiny.records(out / split) for split in ("train", "validation")]
    tokens = [[tuple(record.token_ids.tolist()) for record in records] for records in splits]
    assert not {*tokens[0]} & {*tokens[1]}, "copies of a text stay on one side"
    assert sum(map(len, tokens)) == 36
    prompts = Counter(record.document.partition("#teacher_prompt=")[2] for records in splits for record in records)
    assert sorted(prompts.values()) == [12, 12, 12]
    assert "" in prompts
    before = bytes_of(out)
    write_caches(export("A river. ", None), out, extend=True)
    assert bytes_of(out) == before, "there was nothing new"
