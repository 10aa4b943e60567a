"""One bad row does not stop an export of a million: counted by reason and named, or one message with the count."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.cache.manifest import read_manifest
from data.corpus.bad_rows import SKIPPED_ROWS_FILE, BadRows
from data.corpus.corpus import Corpus
from data.corpus.documents import Document
from data.corpus.encoding import Encoder
from data.export.plan import make_plans
from data.storage.storage import storage_at
from data.text_lines import BadRowError
from kd_core.errors import UsageError
from tests.launchers.command import run
from tests.tiny import Tiny

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('refused') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
GOOD = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The old owl sees a road."}]}
EIGHT: dict[str, bytes] = {
    "not JSON": b'{"messages": [',
    "not UTF-8": b'{"text": "caf\xe9"}',
    "half a surrogate pair": b'{"text": "\\ud83d"}',
    "not a JSON object": b"[1]",
    "no field that is known": b'{"title": "x"}',
    "several readings": json.dumps({**GOOD, "text": "something else"}).encode(),
    "a field of another type": b'{"text": 3}',
    "a function call that is not JSON": b'{"conversations": [{"from": "function_call", "value": "look()"}]}',
}


def _rows(path: Path, number: int, bad: int) -> Path:
    """So many rows, of which so many are bad, spread over the file."""
    kinds = list(EIGHT.values())
    every = number // bad if bad else number + 1
    lines = [json.dumps({**GOOD, "id": i}).replace("a road", f"road {i}").encode() for i in range(number)]
    for i in range(bad):
        lines[every * i + 7] = kinds[i % len(kinds)]
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.fixture(scope="module")
def teacher(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "teacher"
    folder.mkdir()
    for file in tiny.teacher.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_ten_thousand_rows_with_forty_bad_ones_of_eight_kinds(
    tiny: Tiny, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _rows(tmp_path / "a.jsonl", 10_000, 40)
    corpus = Corpus(str(path), on_bad_row="skip")
    bad = corpus.bad_rows()
    with caplog.at_level("INFO", logger="kd"):
        plans = make_plans(tiny.export(teacher=str(teacher), corpus=corpus), tmp_path / "out", bad_rows=bad)
    wanted = dict.fromkeys(EIGHT, 5)
    assert bad.counts() == wanted == plans[0].identity["corpus"]["skipped"]
    assert "40 of 10000 rows skipped: 5 " in caplog.text
    assert sum(len({window.document for window in plan.windows}) for plan in plans) == 9_960
    bad.write(storage_at(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / SKIPPED_ROWS_FILE).read_text().splitlines()]
    assert [line["row"] for line in lines] == [f"a.jsonl:{250 * i + 8}" for i in range(40)]
    assert Counter(line["reason"] for line in lines) == wanted
    assert all(f"{path}:" in line["message"] for line in lines)

    corpus = Corpus(str(path))
    with pytest.raises(UsageError) as refused:
        make_plans(tiny.export(teacher=str(teacher), corpus=corpus), tmp_path / "out")
    first, following = str(refused.value).split("\n")
    assert f"{path}:8: not JSON" in first
    assert following.startswith("Of the rows that follow, 39 cannot be used either: 5 not UTF-8, ")
    assert following.endswith("4 not JSON. Fix it, or skip such rows: corpus.on_bad_row=skip.")


def test_counting_ends_where_all_rows_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.corpus.bad_rows.ROWS_READ_AFTER_LIMIT", 20)
    (tmp_path / "a.jsonl").write_text('{"title": "x"}\n' * 1000)
    corpus = Corpus(str(tmp_path))
    with pytest.raises(UsageError, match="Of the 20 rows that follow, 20 cannot be used"):
        list(corpus.documents(corpus.bad_rows()))


@pytest.mark.parametrize(
    ("most", "bad", "refused"),
    [(0.01, 4, False), (0.01, 5, True), (5.0, 5, False), (4.0, 5, True), (0.0, 1, True), (0.0, 0, False)],
)
def test_the_limit_is_a_share_or_a_number(
    tiny: Tiny, teacher: Path, tmp_path: Path, most: float, bad: int, refused: bool
) -> None:
    path = _rows(tmp_path / "a.jsonl", 400, bad)
    export = tiny.export(teacher=str(teacher), corpus=Corpus(str(path), on_bad_row="skip", most_bad_rows=most))
    if refused:
        with pytest.raises(
            UsageError,
            match=rf"\n{bad} of 400 rows cannot be used: .*={most:g} .* more: --config=corpus.most_bad_rows={bad}\.",
        ):
            make_plans(export, tmp_path)
        return
    plan = make_plans(export, tmp_path)[0].identity["corpus"]
    assert sum(plan.get("skipped", {}).values()) == bad
    assert ("skipped" in plan) == (bad > 0)


def test_plans_without_bad_rows_are_as_before(tiny: Tiny, tmp_path: Path) -> None:
    wanted = json.loads((tiny.train / "plan.json").read_text())
    assert set(wanted["corpus"]) == {"fingerprint", "text_field", "content"}
    skipping = Corpus(str(tiny.corpus), on_bad_row="skip", most_bad_rows=7)
    assert make_plans(tiny.export(corpus=skipping), tmp_path)[0].identity == wanted


def test_what_the_tokenizer_fails_on_is_skipped_too(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tiny.teacher)
    encode = encoder.tokenizer.encode

    def failing(texts: list[str]) -> list[list[int]]:
        if any("\0" in text for text in texts):
            raise UsageError("the tokenizer fails on a text (it panicked)")
        return encode(texts)

    monkeypatch.setattr(encoder.tokenizer, "encode", failing)  # no tokenizer at hand fails on some texts alone
    documents = [Document("a", "The old owl."), Document("b", "\0"), Document("c", "The hen.")]
    bad = Corpus("", on_bad_row="skip", most_bad_rows=1).bad_rows()
    assert [each.name for each in encoder.encode(documents, bad)] == ["a", "c"]
    assert [(each.row, each.reason) for each in bad.bad] == [("b", "the tokenizer fails")]
    with pytest.raises(UsageError, match="b: the tokenizer fails on a text"):
        list(encoder.encode(documents))


def test_the_command_skips_counts_and_names(teacher: Path, tmp_path: Path) -> None:
    path = _rows(tmp_path / "a.jsonl", 60, 3)
    items = ["quickstart_export", f"teacher={teacher}", f"corpus.path={path}", "train_tokens=none", "row_length=32",
             "validation_tokens=none", "selection.top_k=8"]  # fmt: skip
    flags = [*(f"--config={item}" for item in items), f"--out={tmp_path / 'out'}"]
    done = run("launchers.export_teacher", *flags)
    assert done.returncode == 1
    assert "a.jsonl:8: not JSON" in done.stderr
    assert "2 cannot be used either: 1 not UTF-8, 1 half a surrogate pair" in done.stderr
    flags += ["--config=corpus.on_bad_row=skip", "--config=corpus.most_bad_rows=3"]
    for _ in range(2):
        done = run("launchers.export_teacher", *flags)
        assert done.returncode == 0, done.stderr
        assert "3 of 60 rows skipped: 1 not JSON, 1 not UTF-8, 1 half a surrogate pair" in done.stderr
        assert len((tmp_path / "out" / SKIPPED_ROWS_FILE).read_text().splitlines()) == 3
    manifest: dict[str, Any] = read_manifest(tmp_path / "out" / "train").plans[0]
    assert manifest["corpus"]["skipped"] == {"not JSON": 1, "not UTF-8": 1, "half a surrogate pair": 1}


def test_a_share_of_few_rows_is_one_row() -> None:
    bad = BadRows("skip", 0.01)
    for number in range(60):
        bad.count_row()
        if number == 7:
            bad.add("a:7", BadRowError("a:7: no", "no"))
    bad.finish("a")
    bad.add("a:8", BadRowError("a:8: no", "no"))
    with pytest.raises(UsageError, match="2 of 60 rows cannot be used"):
        bad.finish("a")
