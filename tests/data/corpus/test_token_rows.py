"""Rows of token ids, and prompts that the teacher alone reads, down to what is stored of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.cache.inspection.verify import verify
from data.cache.record import Array, Record
from data.cache.selection import Selection
from data.corpus.corpus import Corpus
from data.corpus.encoding import Encoder
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from kd_core.students.starts.start import Pretrained, build_student
from tests.tiny import CHATML, Tiny, make_chat_folder, write_caches


def _corpus(folder: Path, rows: list[dict[str, Any]]) -> Corpus:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus(str(folder / "a.jsonl"))


def _log_probs(tiny: Tiny, ids: list[int]) -> Array:
    """The teacher's distribution behind each token but the last, in float64.  [T, V]"""
    teacher = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0).double()
    tokens = torch.tensor([ids[:-1]])
    with torch.no_grad():
        logits = teacher(tokens, torch.arange(tokens.shape[1])[None], torch.zeros_like(tokens))
    return torch.log_softmax(logits[0], dim=-1).numpy()


def _check(record: Record, truth: Array) -> None:
    """Compares the scored positions of a record with the teacher's distributions of its labels.  truth [n, V]"""
    scored = record.loss_mask.astype(bool)
    labels = record.token_ids[1:][scored]
    assert len(truth) == len(labels)
    best = np.sort(truth, axis=1)[:, ::-1][:, :8]
    assert np.abs(np.sort(record.topk_log_probs[scored], axis=1)[:, ::-1] - best).max() < 1e-4
    entries = np.take_along_axis(truth, record.topk_token_ids[scored].astype(np.int64), 1)
    assert np.abs(entries - record.topk_log_probs[scored]).max() < 1e-4
    assert np.abs(truth[np.arange(len(labels)), labels] - record.label_log_prob[scored]).max() < 1e-4


def test_token_ids_are_scored_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    fingerprint, numbers = Tokenizer(tiny.teacher).fingerprint(), np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(6):
        ids, mask = numbers.integers(0, 300, 20).tolist(), numbers.integers(0, 2, 20).tolist()
        rows.append({"tokens": ids, "loss_mask": [*mask[:-1], 1], "name": f"row {i}", "tokenizer": fingerprint})
    rows.append({"tokens": [5, 6, 7]})
    write_caches(tiny.export(corpus=_corpus(tmp_path, rows), codec="lossless"), tmp_path / "out")
    records = {r.document: r for split in ("train", "validation") for r in tiny.records(tmp_path / "out" / split)}
    assert sorted(records) == ["a.jsonl:7", *(f"row {i}" for i in range(6))]
    for i, row in enumerate(rows):
        record = records[row.get("name", "a.jsonl:7")]
        assert record.token_ids.tolist() == row["tokens"], "no BOS, no EOS, never decoded"
        mask = row.get("loss_mask", [1] * 3)
        assert record.loss_mask.tolist() == mask[1:]
        _check(record, _log_probs(tiny, row["tokens"])[np.asarray(mask[1:], bool)])
        assert i < 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": [1, 320]}, "has the id 320; the teacher's vocabulary has 3"),
        ({"tokens": [1, True]}, "'tokens' is no list of 1 or more integers"),
        ({"tokens": [1, -2]}, "'tokens' is no list of 1 or more integers"),
        ({"tokens": "1 2"}, "'tokens' is no list"),
        ({"tokens": []}, "'tokens' is no list"),
        ({"tokens": [1, 2], "loss_mask": [1]}, "'loss_mask' has 1 elements and 'tokens' 2"),
        ({"tokens": [1, 2], "loss_mask": [1, 2]}, "'loss_mask' is no list of 1 or more integers from 0 to 1"),
        ({"tokens": [1, 2], "tokenizer": "abc"}, "its 'tokenizer' is 'abc'; that of the teacher is [0-9a-f]{64}"),
        ({"tokens": [1, 2], "name": 7}, "'name' is 7; wanted a text"),
        ({"tokens": [1, 2], "name": ""}, "'name' is ''; wanted a text"),
        ({"tokens": [1, 2], "teacher_prompt": "text"}, "'teacher_prompt' is no list"),
        ({"tokens": [1, 2], "text": "two"}, "Set corpus.content=text or tokens"),
        ({"text": "a b", "teacher_prompt": "c"}, "beside a plain text, which has no completion"),
        ({"prompt": "a", "completion": "b", "teacher_prompt": 3}, "'teacher_prompt' is a int"),
        ({"prompt": "The ", "completion": "fox", "teacher_prompt": "The"}, "the completion has other tokens behind"),
    ],
)
def test_bad_rows_are_named(tiny: Tiny, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        list(Encoder(tiny.teacher).encode(_corpus(tmp_path, [row]).documents()))
    assert "a.jsonl:1" in str(raised.value)


@pytest.mark.parametrize(
    "selection", [Selection(8), Selection(8, draws=3, tail_temperatures=(2.0,)), Selection(0, draws=4)]
)
def test_the_teacher_reads_its_own_prompt_before_the_same_completion(
    tiny: Tiny, tmp_path: Path, selection: Selection
) -> None:
    rows = [
        {
            "prompt": f"The fox {i}. ", "completion": "The old owl hears a river.",
            "teacher_prompt": "The young hen sees a light. " * (i % 3 + 1) + f"{i}. ",
        }
        for i in range(5)
    ]  # fmt: skip
    rows += [{"prompt": f"A road {i}. ", "completion": "The loud hen follows."} for i in range(3)]
    export = tiny.export(corpus=_corpus(tmp_path, rows), codec="lossless", selection=selection)
    write_caches(export, tmp_path / "out")
    words, seen = Tokenizer(tiny.teacher), 0
    for split in ("train", "validation"):
        assert not verify(tmp_path / "out" / split, lambda _: None).problems
        for record in tiny.records(tmp_path / "out" / split):
            row = rows[int(record.document.partition("#")[0].split(":")[1]) - 1]
            assert words.decode(record.token_ids.tolist()) == row["prompt"] + row["completion"]
            scored = int(record.loss_mask.sum())
            assert record.loss_mask[-scored:].all()
            [ids] = words.encode([row.get("teacher_prompt", row["prompt"]) + row["completion"]])
            truth = _log_probs(tiny, ids)[-scored:]
            if selection.top_k:
                _check(record, truth)
            else:
                labels = record.token_ids[1:][-scored:]
                error = truth[np.arange(scored), labels] - record.label_log_prob[-scored:]
                assert np.abs(error).max() < 1e-4
            if "teacher_prompt" in row:
                unscored = record.topk_log_probs[:-scored]
                assert (unscored == -np.inf).all()
                assert (record.tail_log_prob[:-scored] == 0).all()
            seen += 1
    assert seen == len(rows)
    plan = json.loads((tmp_path / "out" / "train" / "plan.json").read_text())
    assert "windows_contexts" in plan
    assert "windows_contexts" not in json.loads((tiny.train / "plan.json").read_text())


def test_conversations_and_token_ids_have_contexts_too(tiny: Tiny, tmp_path: Path) -> None:
    folder = make_chat_folder(tiny, tmp_path / "teacher", chat_template=CHATML)
    turns = [{"role": "user", "content": "The fox."}, {"role": "assistant", "content": "The owl."}]
    other = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "A hen?"}]
    rows: list[dict[str, Any]] = [
        {"messages": turns, "teacher_prompt": "Be loud."},
        {"messages": turns, "teacher_prompt": other},
        {"prompt": turns[:1], "completion": turns[1:], "teacher_prompt": "A river?"},
        {"tokens": [9, 8, 7, 6], "loss_mask": [0, 0, 1, 1], "teacher_prompt": [50, 51]},
    ]
    encoder = Encoder(folder)
    encoded = list(encoder.encode(_corpus(tmp_path, rows).documents()))
    found = []
    for document in encoded:
        assert document.context is not None
        begin = int(document.loss_mask.argmax()) + 1
        found.append((document.context.tolist(), document.token_ids[begin:].tolist()))
    texts = [tuple(map(encoder.tokenizer.decode, pair)) for pair in found[:3]]
    completion = "The owl.<|im_end|>\n"
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    begin = "<|im_start|>assistant\n"
    assert texts == [
        (turn.format("system", "Be loud.") + turn.format("user", "The fox.") + begin, completion),
        (turn.format("system", "Be short.") + turn.format("user", "A hen?") + begin, completion),
        (turn.format("user", "A river?") + begin, completion),
    ]
    assert found[3] == ([50, 51], [7, 6])
    assert len({document.digest for document in encoded}) == 3, "one side of the split for one text, in two contexts"


def test_a_completion_that_a_window_would_cut_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"prompt": "The fox. ", "completion": "A hen. " * 30, "teacher_prompt": "The owl. "}]
    rows += [{"prompt": "The fox. ", "completion": "A hen.", "teacher_prompt": "The owl. " * 200}]
    rows += [{"prompt": f"The {i} fox. ", "completion": "A hen.", "teacher_prompt": "The owl. "} for i in range(3)]
    corpus = _corpus(tmp_path, rows)
    with pytest.raises(UsageError, match=r"a.jsonl:1: has a teacher_prompt, and \d+ positions; a window has 32"):
        write_caches(tiny.export(corpus=corpus), tmp_path / "out")
    skipping = Corpus(corpus.path, on_bad_row="skip", most_bad_rows=2)
    write_caches(tiny.export(corpus=skipping), tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "train" / "plan.json").read_text())
    assert plan["corpus"]["skipped"] == {"too long for its teacher_prompt": 2}
