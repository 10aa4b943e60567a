"""Corpus in, caches out: the same bytes however the export ran; bad input named."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.cache.manifest import read_manifest
from data.cache.selection import Selection
from data.corpus.corpus import Corpus, split_documents
from data.corpus.documents import Document
from data.corpus.encoding import Encoded, Encoder
from data.corpus.windows import Window, choose_windows, cut_windows
from data.export import export as steps
from data.export.extend import SPLITS
from data.export.plan import make_plans
from data.export.resume_check import record_or_check_plan, recorded_choices
from data.export.teacher_export import choose_batch_rows, choose_scorer
from data.teacher.select import select_entries
from kd_core.errors import UsageError
from kd_core.students.huggingface.config_json import read_architecture
from kd_core.students.starts.start import Pretrained, build_student
from tests.data.cache.earlier import make_earlier
from tests.tiny import ROW_LENGTH, Tiny, bytes_of, write_caches


def test_interruption_and_ranks_do_not_change_a_byte(tiny: Tiny, tmp_path: Path) -> None:
    export = tiny.export()
    write_caches(export, tmp_path / "ranks", ranks=3)
    assert bytes_of(tmp_path / "ranks") == bytes_of(tiny.root / "cache")

    cut = tmp_path / "cut"
    plan = make_plans(export, cut)[0]
    record_or_check_plan(plan)
    model = steps.load_teacher(export, torch.device("cpu"))
    steps.write_missing_shards(plan, model, steps.make_tables(plan, model), rank=1, ranks=2)
    (plan.folder / "shard-000000.tar.partial").write_bytes(b"half a shard")
    write_caches(export, cut)
    assert bytes_of(cut) == bytes_of(tiny.root / "cache")


def test_a_lost_shard_is_made_again_the_same(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.root / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "train" / "shard-000002.tar").unlink()
    write_caches(tiny.export(), tmp_path / "cache")
    assert bytes_of(tmp_path / "cache") == bytes_of(tiny.root / "cache")


def test_another_export_in_the_same_folder_is_refused(tiny: Tiny) -> None:
    plan = make_plans(tiny.export(selection=Selection(top_k=4)), tiny.root / "cache")[0]
    with pytest.raises(UsageError, match=r"another selection"):
        record_or_check_plan(plan)


def test_another_corpus_is_the_first_difference_and_is_named_by_its_path(tiny: Tiny, tmp_path: Path) -> None:
    lines = (json.dumps({"text": f"A hen of {years} years."}) for years in range(40))
    (path := tmp_path / "other.jsonl").write_text("\n".join(lines))
    other = tiny.export(corpus=Corpus(str(path)))
    plan = make_plans(other, tiny.root / "cache")[0]
    found = rf"another corpus \({re.escape(str(tiny.corpus))}; now {re.escape(str(path))}\)\. .* with --extend\.$"
    with pytest.raises(UsageError, match=found):
        record_or_check_plan(plan)
    plan = make_plans(replace(other, row_length=8), tiny.root / "cache")[0]
    with pytest.raises(UsageError, match=r"another corpus .*\. Choose another --out, or delete the folder\.$"):
        record_or_check_plan(plan)


def test_what_is_stored_is_what_the_teacher_says_in_float64(tiny: Tiny, tmp_path: Path) -> None:
    teacher = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0).double()
    write_caches(tiny.export(codec="lossless"), tmp_path)
    for record in tiny.records(tmp_path / "train"):
        tokens = torch.from_numpy(record.token_ids.astype(np.int64))
        T = record.positions
        with torch.no_grad():
            logits = teacher(tokens[None, :-1], torch.arange(T)[None], torch.zeros(1, T, dtype=torch.int64))
        truth = torch.log_softmax(logits[0], dim=-1)
        best = truth.topk(8)
        order = np.argsort(-record.topk_log_probs, axis=1)
        assert np.abs(best.values.numpy() - np.take_along_axis(record.topk_log_probs, order, 1)).max() < 1e-4
        rest = truth.scatter(1, best.indices, -torch.inf).logsumexp(dim=1)
        assert np.abs(rest.numpy() - record.tail_log_prob).max() < 1e-4
        label = truth.gather(1, tokens[1:, None])[:, 0]
        assert np.abs(label.numpy() - record.label_log_prob).max() < 1e-4


def test_a_tiny_tail_is_summed_and_not_what_is_left_of_one() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 7] = 40.0
    truth = torch.log_softmax(logits.double(), dim=1)
    scores = select_entries(logits.clone(), torch.tensor([3]), Selection(top_k=1), torch.zeros(1, 0))
    rest = truth.scatter(1, torch.tensor([[7]]), -torch.inf).logsumexp(dim=1)
    assert scores.tail_log_prob.item() == pytest.approx(rest.item(), rel=1e-6)
    assert scores.label_log_prob.item() == pytest.approx(truth[0, 3].item(), rel=1e-6)


def _encoded(tiny: Tiny) -> list[Encoded]:
    return list(Encoder(tiny.teacher).encode(Corpus(str(tiny.corpus)).documents()))


def test_windows_score_every_token_but_a_documents_first_exactly_once(tiny: Tiny) -> None:
    documents = _encoded(tiny)
    windows = list(cut_windows(documents, ROW_LENGTH))
    for document in documents:
        labels = [int(i) for w in windows if w.document == document.name for i in w.token_ids[1:]]
        assert labels == document.token_ids[1:].tolist()
    assert all(len(window.token_ids) <= ROW_LENGTH + 1 and window.loss_mask.all() for window in windows)


def test_windows_are_drawn_within_the_budget_and_again_the_same(tiny: Tiny) -> None:
    windows = list(cut_windows(_encoded(tiny), ROW_LENGTH))

    def drawn(seed: int) -> list[tuple[str, int]]:
        return [(window.document, window.start) for window in choose_windows(windows, 200, seed)]

    assert 200 - ROW_LENGTH < sum(w.positions for w in choose_windows(windows, 200, seed=1)) <= 200
    assert drawn(1) == drawn(1) != drawn(2)


def test_the_split_goes_by_content_and_keeps_copies_together() -> None:
    documents = [Document(f"{i}", f"text {i % 20}") for i in range(60)]
    known = [Encoded(d.name, np.zeros(2, np.int32), np.ones(1, np.uint8), d.digest()) for d in documents]
    renamed = [each._replace(name=f"renamed {each.name}") for each in reversed(known)]
    sides = split_documents(known, 0.2, seed=0)
    held_out = {each.digest for each in sides["validation"]}
    assert len(held_out) == 4
    assert len(sides["validation"]) == 12
    assert held_out.isdisjoint(each.digest for each in sides["train"])
    assert {each.digest for each in split_documents(renamed, 0.2, seed=0)["validation"]} == held_out


def test_an_interrupted_export_goes_on_with_the_same_documents_alone(tiny: Tiny, tmp_path: Path) -> None:
    """The corpus' folder is renamed behind the interruption: the documents and their order are the same."""
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(tiny.corpus, corpus / "b")
    (corpus / "c").mkdir()
    for path in sorted((corpus / "b").iterdir())[:6]:
        path.rename(corpus / "c" / path.name)
    export = tiny.export(corpus=Corpus(str(corpus)))
    write_caches(export, out)
    whole = {split: [(r.start, r.token_ids.tolist()) for r in tiny.records(out / split)] for split in SPLITS}
    for path in [out / "train" / "manifest.json", *sorted((out / "train").glob("shard-*.tar"))[2:]]:
        path.unlink()
    (corpus / "b").rename(corpus / "a")
    write_caches(export, out)
    assert whole == {split: [(r.start, r.token_ids.tolist()) for r in tiny.records(out / split)] for split in SPLITS}
    (out / "train" / "manifest.json").unlink()
    (corpus / "a").rename(corpus / "d")  # now in another order
    with pytest.raises(UsageError, match="another corpus"):
        write_caches(export, out)


def test_an_interrupted_export_does_not_go_on_with_other_labels_to_score(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a change of what counts as the assistant's would have it: all else, the tokens too, is the same."""
    write_caches(tiny.export(), tmp_path)
    (tmp_path / "train" / "manifest.json").unlink()
    plain = cut_windows

    def unscored(*args: Any) -> Iterator[Window]:
        for window in plain(*args):
            yield window._replace(loss_mask=np.concatenate([[0], window.loss_mask[1:]]))

    monkeypatch.setattr("data.export.spool.draw.cut_windows", unscored)
    with pytest.raises(UsageError, match="holds an export with another windows_masks"):
        write_caches(tiny.export(), tmp_path)


@pytest.mark.parametrize("lacking", [("windows", "windows_masks"), ("windows_masks",)])
def test_a_cache_of_an_earlier_version_is_reused_and_half_of_one_refused(
    tiny: Tiny, tmp_path: Path, lacking: tuple[str, ...]
) -> None:
    shutil.copytree(tiny.root / "cache", tmp_path / "cache")
    plan, path = tmp_path / "cache" / "train" / "plan.json", tmp_path / "cache" / "train" / "manifest.json"
    old = json.loads(plan.read_text())
    for name in lacking:
        del old[name]
    plan.write_text(json.dumps(old))
    before = make_earlier(path.parent, 2, plans=[old])
    assert read_manifest(path.parent).identity() == hashlib.sha256(before).hexdigest()
    write_caches(tiny.export(), tmp_path / "cache")
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(UsageError, match="an earlier version began"):
        write_caches(tiny.export(), tmp_path / "cache")


def test_whole_documents_are_held_out() -> None:
    documents = [Encoded(f"{i}", np.zeros(2, np.int32), np.ones(1, np.uint8), bytes([i])) for i in range(50)]
    sides = split_documents(documents, 0.1, seed=0)
    assert len(sides["validation"]) == 5
    assert {d.name for d in sides["train"]}.isdisjoint(d.name for d in sides["validation"])
    assert len(sides["train"]) == 45


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no .txt, .md, .*.parquet, .arrow or .feather file"),
        ({"a.txt": b"only one document"}, "wanted two or more"),
        ({"a.txt": b"x", "b.txt": b"y", "c.txt": b""}, "wanted two or more"),
        ({"a.jsonl": b'{"text": "fine"}\n{"text": broken\n'}, r"a.jsonl:2: not JSON"),
        ({"a.jsonl": b'{"body": "no text"}\n'}, "a.jsonl:1: no field 'text'"),
        ({"a.jsonl": b'{"text": 3}\n'}, "is a int, wanted text"),
        ({"a.txt": b"caf\xe9"}, "a.txt: not UTF-8"),
        ({"a.txt": b"(", "b.txt": b")", "c.txt": b"?!"}, "wanted two or more|no window"),
    ],
)
def test_bad_corpora_are_named(tiny: Tiny, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "corpus").mkdir()
    for name, payload in files.items():
        (tmp_path / "corpus" / name).write_bytes(payload)
    with pytest.raises(UsageError, match=message):
        make_plans(tiny.export(corpus=Corpus(str(tmp_path / "corpus"))), tmp_path / "out")


def test_a_document_of_one_token_is_left_out_and_the_rest_exported(tiny: Tiny, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny.corpus, corpus)
    (corpus / "one.txt").write_text(".")
    write_caches(tiny.export(corpus=Corpus(str(corpus))), tmp_path / "out")
    read = [read_manifest(tmp_path / "out" / split) for split in ("train", "validation")]
    assert sum(manifest.records for manifest in read) >= 24


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, teacher)
    config = teacher / "config.json"
    size = read_architecture(teacher).vocab_size
    config.write_text(config.read_text().replace(f'"vocab_size": {size}', '"vocab_size": 260'))
    with pytest.raises(UsageError, match="do not belong together"):
        make_plans(tiny.export(teacher=str(teacher)), tmp_path / "out")


def test_rows_are_batched_by_device_and_as_the_cache_began(tiny: Tiny, tmp_path: Path) -> None:
    export, cpu, gpu = tiny.export(batch_rows=None, row_length=512), torch.device("cpu"), torch.device("cuda")
    assert [choose_batch_rows(export, device) for device in (cpu, gpu)] == [2, 16]
    assert choose_batch_rows(replace(export, row_length=16_384), gpu) == 1
    assert choose_batch_rows(replace(export, batch_rows=5), gpu, 3) == 5
    # A plan that a CPU has made holds what an explicit 2 gives, and it is the recorded value that continues.
    plans = [make_plans(tiny.export(batch_rows=rows), tmp_path / "out")[0] for rows in (None, 2)]
    assert plans[0].identity == plans[1].identity
    assert recorded_choices(tmp_path / "out") == (None, None, None)
    record_or_check_plan(plans[0])
    assert recorded_choices(tmp_path / "out") == ("float32", 2, "decoder")
    assert choose_batch_rows(export, gpu, 2) == 2


def test_auto_keeps_the_scorer_that_a_cache_began_with(tiny: Tiny, tmp_path: Path) -> None:
    """Earlier versions scored families by transformers that our decoder has now."""
    record_or_check_plan(make_plans(tiny.export(scorer="transformers"), tmp_path / "out")[0])
    export, recorded = tiny.export(scorer="auto"), recorded_choices(tmp_path / "out")[2]
    with pytest.raises(UsageError, match="another scorer"):
        record_or_check_plan(make_plans(export, tmp_path / "out")[0])
    export = replace(export, scorer=choose_scorer(export, recorded))
    assert not record_or_check_plan(make_plans(export, tmp_path / "out")[0])
    assert [choose_scorer(tiny.export(scorer=name), recorded) for name in ("decoder", "vllm")] == ["decoder", "vllm"]
    assert choose_scorer(tiny.export(scorer="auto"), "vllm") == "auto"
