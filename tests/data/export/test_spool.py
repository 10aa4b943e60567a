"""Windows of a long corpus on disk: the same however they came there, and never all in memory."""

import hashlib
import json
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.cache.contents import mask_digest, window_digest
from data.cache.inspection.verify import verify
from data.cache.manifest import read_manifest
from data.corpus import row_encoding
from data.corpus.corpus import Corpus
from data.corpus.row_encoding import RowEncoder
from data.export import export as steps
from data.export.extend import load_growth
from data.export.plan import CachePlan, make_plans
from data.export.receipts import write_manifest
from data.export.resume_check import record_or_check_plan
from data.export.spool import planning
from data.export.spool.planning import SpoolPass
from data.export.spool.spool import SpoolWindows
from data.export.spool.spool_folder import remove_spool, spool_folder
from data.export.spool.spool_parts import SPLITS
from data.export.tokenize_beside import tokenize_beside
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from tests.tiny import ROW_LENGTH, Tiny, bytes_of, write_caches

Found = dict[str, list[tuple[str, int, list[int], list[int]]]]


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any corpus of more than 2,000 bytes is a long one, read in small batches and written in small parts."""
    monkeypatch.setattr(planning, "HEAD_BYTES", 2_000)
    monkeypatch.setattr(planning, "PART_POSITIONS", 300)
    monkeypatch.setattr(row_encoding, "BATCH_DOCUMENTS", 4)


def _lines(path: Path, number: int, first: int = 0) -> Corpus:
    words = random.Random(7)
    texts = [" ".join(words.choices(["The", "old", "fox", "sees", "a", "river."], k=i % 97 + 3)) for i in range(number)]
    texts[11] = texts[5]  # copies of one text
    rows = [{"text": f"{i} {text}" if i not in (5, 11) else text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[first:]))
    return Corpus(str(path))


def _found(plans: list[CachePlan]) -> Found:
    return {
        plan.identity["split"]: [
            (w.document, w.start, w.token_ids.tolist(), w.loss_mask.tolist()) for w in plan.windows
        ]
        for plan in plans
    }


def _hash(*parts: bytes) -> float:
    return int(hashlib.sha256(b"".join(parts)).hexdigest()[:16], 16) / 16**16


def _expected(tiny: Tiny, corpus: Corpus, rates: dict[str, float], tokens: dict[str, int | None], seed: int) -> Found:
    """The whole corpus in memory, by the rules that docs/corpora.md states."""
    words, found = Tokenizer(tiny.teacher), Found(train=[], validation=[])
    taken = dict.fromkeys(found, 0)
    for number, line in enumerate(Path(corpus.path).read_text().splitlines(), 1):
        text = json.loads(line)["text"]
        digest = hashlib.sha256(json.dumps(text).encode()).digest()[:16]
        split = "validation" if _hash(f"{seed} ".encode(), digest) < 0.2 else "train"
        [ids] = words.encode([text])
        for start in range(0, len(ids) - 1, ROW_LENGTH):
            window = ids[start : start + ROW_LENGTH + 1]
            limit = tokens[split]
            if rates[split] < 1 and _hash(f"{seed} {start} ".encode(), digest) >= rates[split]:
                continue
            if limit is not None and taken[split] + len(window) - 1 > limit:
                continue
            taken[split] += len(window) - 1
            found[split].append((f"{Path(corpus.path).name}:{number}", start, window, [1] * (len(window) - 1)))
    return found


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("tokens", [None, 500])
def test_a_long_corpus_is_split_and_drawn_by_hashes(tiny: Tiny, tmp_path: Path, tokens: int | None) -> None:
    corpus = _lines(tmp_path / "a.jsonl", 120)
    export = tiny.export(corpus=corpus, train_tokens=tokens, seed=3)
    plans = make_plans(export, tmp_path / "out")
    rates = plans[0].identity["draw"]
    assert rates["validation"] == 1
    assert (rates["train"] == 1) == (tokens is None)
    if tokens:  # an estimate from the first 2,000 of some 30,000 bytes
        total = sum(
            len(w[3]) for w in _found(make_plans(replace(export, train_tokens=None), tmp_path / "all"))["train"]
        )
        assert rates["train"] == pytest.approx(tokens / total, rel=0.25)
    wanted = _expected(tiny, corpus, rates, {"train": tokens, "validation": None}, 3)
    assert _found(plans) == wanted
    assert all(wanted.values())
    for plan in plans:
        split = plan.identity["split"]
        assert plan.windows.positions.tolist() == [len(window[3]) for window in wanted[split]]
        assert [plan.windows[i].start for i in (0, -1)] == [wanted[split][i][1] for i in (0, -1)]
        with pytest.raises(IndexError):
            plan.windows[len(plan.windows)]


@pytest.mark.usefixtures("long")
def test_lengths_and_hashes_of_windows_are_read_across_parts(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "PART_POSITIONS", 40)  # so that some parts have no window of one cache
    for plan in make_plans(tiny.export(corpus=_lines(tmp_path / "a.jsonl", 60)), tmp_path / "out"):
        windows, counts = list(plan.windows), [len(positions) for positions in plan.windows.part_positions()]
        assert len(counts) > 9
        assert 0 in counts or plan.identity["split"] == "train"
        n = len(windows)
        for chosen in (range(n), range(1), range(n - 1, n), range(2, n - 2), range(3, 5)):
            fresh = SpoolWindows(plan.windows.folder, plan.windows.split)  # has seen no part
            assert fresh.positions_of(chosen).tolist() == [windows[i].positions for i in chosen]
            digests = (
                window_digest(w.start, w.token_ids) + mask_digest(w.loss_mask) for w in map(windows.__getitem__, chosen)
            )
            assert fresh.sha256_of(chosen) == hashlib.sha256(b"".join(digests)).hexdigest()
        with pytest.raises(IndexError):
            plan.windows.positions_of(range(n, n + 1))


@pytest.mark.usefixtures("long")
def test_processes_do_not_change_a_window(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = tiny.export(corpus=_lines(tmp_path / "a.jsonl", 60))
    here = _found(make_plans(export, tmp_path / "here"))
    monkeypatch.setattr(planning, "LOCAL_BYTES", 0)
    monkeypatch.setattr(planning.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert _found(make_plans(export, tmp_path / "beside")) == here


@pytest.mark.usefixtures("long")
def test_a_pass_that_was_killed_goes_on_behind_its_last_part(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = replace(_lines(tmp_path / "a.jsonl", 120), on_bad_row="skip", most_bad_rows=9)
    lines = Path(corpus.path).read_text().splitlines()
    lines[30] = lines[90] = "{"
    Path(corpus.path).write_text("\n".join(lines))
    export = tiny.export(corpus=corpus)
    whole_bad = corpus.bad_rows()
    whole = [plan.completed() for plan in _recorded(make_plans(export, tmp_path / "whole", bad_rows=whole_bad))]
    encoded: list[int] = []
    encode, write = RowEncoder.encode, planning.SpoolPass._write_part

    def counting(self: RowEncoder, batch: Any) -> Any:
        encoded.append(len(batch.rows))
        return encode(self, batch)

    def killed(self: planning.SpoolPass) -> None:
        if self.parts == stop:
            raise KeyboardInterrupt
        write(self)

    monkeypatch.setattr(RowEncoder, "encode", counting)
    for parts in (2, 7):
        stop = parts
        monkeypatch.setattr(planning.SpoolPass, "_write_part", killed)
        with pytest.raises(KeyboardInterrupt):
            make_plans(export, tmp_path / "cut")
    monkeypatch.setattr(planning.SpoolPass, "_write_part", write)
    encoded.clear()
    bad = corpus.bad_rows()
    resumed = [plan.completed() for plan in _recorded(make_plans(export, tmp_path / "cut", bad_rows=bad))]
    assert 0 < sum(encoded) < 90
    assert bad.counts() == whole_bad.counts() == {"not JSON": 2}
    assert _found(resumed) == _found(whole)
    assert [plan.identity for plan in resumed] == [plan.identity for plan in whole]
    assert whole[0].identity["corpus"]["skipped"] == {"not JSON": 2}
    assert whole[0].drawn_from == whole[0].windows.positions.sum()


@pytest.mark.usefixtures("long")
def test_a_pass_that_was_killed_in_the_head_counts_as_a_whole_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "PART_POSITIONS", 30)
    export, write = tiny.export(corpus=_lines(tmp_path / "a.jsonl", 60), train_tokens=150), SpoolPass._write_part

    def killed(self: SpoolPass) -> None:
        if self.parts == 1:
            raise KeyboardInterrupt
        write(self)

    [whole, _] = make_plans(export, tmp_path / "whole")
    monkeypatch.setattr(SpoolPass, "_write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        make_plans(export, tmp_path / "cut")
    monkeypatch.setattr(SpoolPass, "_write_part", write)
    [cut, _] = make_plans(export, tmp_path / "cut")
    assert cut.windows.end() == whole.windows.end()


def _recorded(plans: list[CachePlan]) -> list[CachePlan]:
    for plan in plans:
        assert not record_or_check_plan(plan)
    return plans


def _write(plans: list[CachePlan], ranks: int) -> None:
    for plan in plans:
        model = steps.load_teacher(plan.export, torch.device("cpu"))
        pilot = steps.make_tables(plan, model)
        for rank in range(ranks):
            steps.write_missing_shards(plan, model, pilot, rank, ranks)
        write_manifest(plan)


@pytest.mark.usefixtures("long")
@pytest.mark.timeout(120)
def test_a_teacher_scores_while_the_corpus_is_tokenised(tiny: Tiny, tmp_path: Path) -> None:
    corpus = _lines(tmp_path / "a.jsonl", 60)
    export = tiny.export(corpus=corpus, train_tokens=700, validation_tokens=200)
    write_caches(export, tmp_path / "before")
    plans = _recorded(make_plans(export, tmp_path / "beside", wait=False))
    assert not (plans[0].windows.folder / "end.json").exists()
    with tokenize_beside(plans, tmp_path / "beside", starts=True):
        _write(plans, ranks=2)
    for plan in plans:
        assert bytes_of(plan.folder) == bytes_of(tmp_path / "before" / plan.identity["split"])
        assert not verify(plan.folder, lambda _: None).problems
        assert record_or_check_plan(plan), "it is complete"
    remove_spool(plans[0].windows.folder, tmp_path / "beside")
    assert not (tmp_path / "beside.spool").exists()


@pytest.mark.usefixtures("long")
@pytest.mark.timeout(120)
def test_a_bad_row_at_the_end_costs_nothing_of_what_was_scored(tiny: Tiny, tmp_path: Path) -> None:
    corpus, out = _lines(tmp_path / "a.jsonl", 60), tmp_path / "out"
    with Path(corpus.path).open("a") as file:
        file.write("{")
    export = tiny.export(corpus=corpus, train_tokens=900, validation_tokens=200)
    plans = _recorded(make_plans(export, out, wait=False))
    with (
        pytest.raises(
            UsageError, match=r"a.jsonl:61: not JSON[\s\S]*leave the file as it is and add corpus.on_bad_row=skip"
        ),
        tokenize_beside(plans, out, starts=True),
    ):
        _write(plans, ranks=1)
    shards = {path: path.stat().st_mtime_ns for path in out.glob("train/shard-*.tar")}
    assert len(shards) > 2
    write_caches(replace(export, corpus=replace(corpus, on_bad_row="skip")), out)
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert read_manifest(out / "train").plans[0]["corpus"]["skipped"] == {"not JSON": 1}


def test_shards_of_another_corpus_do_not_become_part_of_a_cache(tiny: Tiny, tmp_path: Path) -> None:
    """Two corpora of equal lengths whose plans are equal, as where a sampled fingerprint misses a change."""
    plans: list[CachePlan] = []
    for name, word in (("a", "owl"), ("b", "hen")):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"tokens": [number, 7, 8 + ord(word[0]) % 9], "name": str(number)}) for number in range(20)]
        (tmp_path / name / "a.jsonl").write_text("\n".join(rows))
        plans.append(make_plans(tiny.export(corpus=Corpus(str(tmp_path / name))), tmp_path / f"out {name}")[0])
    plans = [replace(plan, folder=tmp_path / "cache") for plan in plans]
    (tmp_path / "cache").mkdir()
    _write(plans[:1], ranks=1)
    with pytest.raises(UsageError, match="holds records of another corpus than the planned windows"):
        _write(plans[1:], ranks=1)
    with pytest.raises(UsageError, match="holds records of another corpus than the planned windows"):
        write_manifest(plans[1])
    # So are shards without an index, which are read back.
    indexes = list((tmp_path / "cache").glob("*.index"))
    for index in indexes:
        index.unlink()
    with pytest.raises(UsageError, match="holds records of another corpus than the planned windows"):
        _write(plans[1:], ranks=1)
    assert not list((tmp_path / "cache").glob("*.index"))
    _write(plans[:1], ranks=1)
    assert all(index.exists() for index in indexes)


@pytest.mark.usefixtures("long")
def test_memory_does_not_grow_with_the_corpus(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PART_POSITIONS", 5_000)

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"tokens": [n % 300, n // 300 % 300] * 500}) + "\n" for n in range(rows))
        tracemalloc.start()
        try:
            plans = make_plans(tiny.export(corpus=Corpus(str(path)), row_length=256), tmp_path / str(rows))
            assert sum(1 for plan in plans for _ in plan.windows) == 4 * rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(30), peak(130)
    assert large - small < 1 << 18, "100 documents more have 100,000 tokens, of 5 bytes each"


@pytest.mark.usefixtures("long")
def test_a_long_corpus_extends_a_cache_by_what_is_new(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, path = tmp_path / "out", tmp_path / "a.jsonl"
    write_caches(tiny.export(corpus=_lines(path, 60)), out)
    before = {split: tiny.records(out / split) for split in SPLITS}
    rows = path.read_text().splitlines()
    changed = [json.dumps({"text": "A young hen hears a road."}), *rows[1:], *rows[:1]]
    more = [json.dumps({"text": f"Another light {i} follows the loud owl."}) for i in range(80)]
    path.write_text("\n".join([*changed, *more, *more[:3]]))
    with caplog.at_level("INFO", logger="kd"):
        write_caches(tiny.export(corpus=Corpus(str(path))), out, extend=True)
    assert "81 of 144 documents are new" in caplog.text
    assert "1 of the new documents have the names of documents in the cache whose content differs" in caplog.text
    after = {split: tiny.records(out / split) for split in SPLITS}
    words = Tokenizer(tiny.teacher)
    added = {
        split: {words.decode(r.token_ids.tolist()) for r in after[split][len(before[split]) :]} for split in SPLITS
    }
    assert added["train"] | added["validation"] == {json.loads(row)["text"] for row in [changed[0], *more]}
    assert not added["train"] & added["validation"]
    assert added["validation"]
    assert load_growth(out, begin=False).manifests["train"].plans[1]["draw"] == {"train": 1.0, "validation": 1.0}
    unchanged = bytes_of(out)
    write_caches(tiny.export(corpus=Corpus(str(path))), out, extend=True)
    assert {n: b for n, b in bytes_of(out).items() if "manifest" not in n} == {
        n: b for n, b in unchanged.items() if "manifest" not in n
    }


def test_exports_that_share_a_folder_for_spools_have_one_each(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = tiny.export(spool=str(tmp_path / "spools"))
    one, other = make_plans(shared, "one"), make_plans(shared, "other")
    remove_spool(one[0].windows.folder, "one")
    assert len(_found(other)["train"]) > 0
    assert spool_folder(shared, tiny.teacher, tmp_path / "other", None) == other[0].windows.folder
    buckets = [spool_folder(tiny.export(), tiny.teacher, f"s3://bucket/{name}", None) for name in "ab"]
    assert buckets[0] != buckets[1]


def test_other_files_beside_the_caches_stay(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mine = tmp_path / "here.spool" / "mine"
    mine.mkdir(parents=True)
    plans = make_plans(tiny.export(), ".")
    remove_spool(plans[0].windows.folder, ".")
    assert list(mine.parent.iterdir()) == [mine]


def test_a_part_that_appears_with_an_error_is_read_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part appears between the look for it and the look for the error."""
    (tmp_path / "failed.json").write_text('{"message": "a bad row"}')
    exists = Path.exists

    def appearing(path: Path) -> bool:
        if path.name == "failed.json":
            (tmp_path / "000000.part").touch()
        return exists(path)

    monkeypatch.setattr(Path, "exists", appearing)
    windows = SpoolWindows(tmp_path, "train")
    assert windows._see_part(0)
    with pytest.raises(UsageError, match="a bad row"):
        windows._see_part(1)


def test_a_damaged_part_is_one_message(tiny: Tiny, tmp_path: Path) -> None:
    plans = make_plans(tiny.export(), tmp_path / "out")
    (part,) = plans[0].windows.folder.glob("*.part")
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"000000.part: damaged .*, wanted a part of a spool. Delete the spool"):
        _ = plans[0].windows[0]
