"""Every format gives its documents, under stable names; what is wrong is named with file and line or row."""

import gzip
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.corpus.chat.conversations import Conversation
from data.corpus.corpus import Corpus
from data.corpus.documents import Document
from kd_core.errors import UsageError

TURNS = [{"role": "user", "content": "Who sees the fox?"}, {"role": "assistant", "content": "The owl."}]

ASKED = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The hen."}]


def _lines(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _documents(path: Path, **settings: str) -> list[Document]:
    return [document._replace(where="") for document in Corpus(str(path), **settings).documents()]


def test_a_folder_of_all_formats(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    _lines(tmp_path / "b.jsonl", {"text": "line\u2028separator", "id": 1}, {"messages": TURNS})
    _lines(tmp_path / "c.json", {"prompt": "Who?", "completion": "The hen."})
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n\n')
    (tmp_path / "deep").mkdir()
    table = pa.table({"text": [None, "cell"], "messages": [TURNS, None], "other": [1, 2]})
    parquet.write_table(table, tmp_path / "deep" / "e.parquet")
    (tmp_path / "notes.md").write_text("read")
    (tmp_path / "deep" / "README.md").write_text("tells of the rows")
    (tmp_path / "scan.pdf").write_bytes(b"not read")
    assert _documents(tmp_path) == [
        Document("a.txt", "one\ntwo\n"),
        Document("b.jsonl:1", "line\u2028separator"),
        Document("b.jsonl:2", Conversation(TURNS)),
        Document("c.json:1", Conversation(ASKED, 1)),
        Document("d.jsonl.gz:1", "zipped"),
        Document("deep/e.parquet:1", Conversation(TURNS)),
        Document("deep/e.parquet:2", "cell"),
        Document("notes.md", "read"),
    ]  # fmt: skip


def test_a_file_by_name_and_other_fields(tmp_path: Path) -> None:
    _lines(tmp_path / "a.jsonl", {"body": "x", "text": 3})
    assert _documents(tmp_path / "a.jsonl", text_field="body") == [Document("a.jsonl:1", "x")]
    parquet.write_table(pa.table({"body": ["y"]}), tmp_path / "b.parquet")
    assert _documents(tmp_path / "b.parquet", text_field="body") == [Document("b.parquet:1", "y")]
    (tmp_path / "README.md").write_text("named itself, it is text")
    assert _documents(tmp_path / "README.md") == [Document("README.md", "named itself, it is text")]


def test_a_prompt_of_messages_is_context_alone(tmp_path: Path) -> None:
    after = [{"role": "user", "content": "And now?"}]
    _lines(tmp_path / "a.jsonl", {"prompt": [*TURNS, *after], "completion": [TURNS[1]]})
    assert _documents(tmp_path) == [Document("a.jsonl:1", Conversation([*TURNS, *after, TURNS[1]], 3))]


def test_a_row_of_several_kinds_needs_a_word(tmp_path: Path) -> None:
    _lines(tmp_path / "a.jsonl", {"text": "plain", "messages": TURNS, "prompt": "Who?"})
    with pytest.raises(
        UsageError, match=r"a.jsonl:1: has 'text' and 'messages'; wanted one .*content=text or messages"
    ):
        _documents(tmp_path)
    assert _documents(tmp_path, content="text") == [Document("a.jsonl:1", "plain")]
    assert _documents(tmp_path, content="messages") == [Document("a.jsonl:1", Conversation(TURNS))]
    with pytest.raises(UsageError, match=r"a.jsonl:1: no field 'completion'; wanted it for corpus.content=completion"):
        _documents(tmp_path, content="completion")
    with pytest.raises(UsageError, match=r"corpus.content: got 'chat'; wanted one of auto, text"):
        _documents(tmp_path, content="chat")


def test_messages_keep_what_templates_may_read_and_lose_nulls(tmp_path: Path) -> None:
    called = [{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}, {"role": "tool", "content": ""}]
    _lines(tmp_path / "a.jsonl", {"messages": [{**TURNS[0], "name": None}, *called, TURNS[1]]})
    [document] = _documents(tmp_path)
    assert isinstance(document.content, Conversation)
    assert document.content.messages == [
        TURNS[0],
        {"role": "assistant", "tool_calls": [{"name": "look"}]},
        called[1],
        TURNS[1],
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "'messages' is a str, wanted a list"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["hello"]}, r"messages\[0\]: is a str, wanted an object"),
        ({"messages": [TURNS[0], {"content": "x"}]}, r"messages\[1\]: no 'role'; wanted one of system"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, r"role is 'narrator'; wanted one of"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"role is \['user'\]"),
        ({"messages": [{"role": "user"}]}, "no 'content'; wanted the text of the user's message"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part of 'content' is 'text', wanted text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "a part of 'content' is 'image'",
        ),
        ({"messages": [{"role": "user", "content": [["x"]]}]}, "a part of 'content' is 'list'"),
        ({"messages": [{"role": "tool", "content": {"x": 1}}]}, "'content' is a dict, wanted text or a list of parts"),
        ({"messages": [{"role": "assistant", "tool_calls": "look"}]}, "'tool_calls' is not a list of objects"),
        ({"messages": TURNS, "tools": "[look]"}, "'tools' is a text that is not JSON"),
        ({"messages": TURNS, "tools": ["look"]}, "'tools' is not a list of objects"),
        ({"messages": TURNS, "tools": "{}{}"}, "'tools' is a text that is not JSON"),
        ({"messages": TURNS, "tools": 3}, "'tools' is not a list of objects"),
        ({"messages": [{"role": "assistant", "content": "  \n"}]}, "the assistant's 'content' is empty"),
        ({"prompt": 3, "completion": "x"}, "'prompt' is a int, wanted text or a list of messages"),
        ({"prompt": "x", "completion": ""}, "completion: the assistant's 'content' is empty"),
        ({"prompt": "x", "completion": [{"role": "judge", "content": "y"}]}, r"completion\[0\]: role is 'judge'"),
        ({"prompt": "x", "answer": "y"}, "no field 'text'.*It has 'answer', 'prompt'"),
        ({"text": None}, "no field 'text'.*It has none"),
        ({"text": ["x"]}, "'text' is a list, wanted text"),
        (["x"], "holds a list, wanted a JSON object.*jq"),
        ("x", "holds a str, wanted a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    _lines(tmp_path / "a.jsonl", {"text": "fine"}, row)
    with pytest.raises(UsageError, match=rf"a.jsonl:2: {message}|a.jsonl:2: .*{message}"):
        _documents(tmp_path)


@pytest.mark.parametrize(
    ("name", "payload", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "a.jsonl:2: not UTF-8 text .* at byte 13"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl:1: half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"text": "x", "y": ' + b"[" * 700 + b"]" * 700 + b"}", "a.jsonl:1: nests too deeply"),
        ("a.csv", b'text,id\n"x,1\n', "a.csv: not CSV at line"),
        ("a.csv", b"text,text\nx,y\n", "a.csv: the header has 'text' twice"),
        ("a.json", b'{\n "data": []\n}', "a.json:1: not JSON .*many lines"),
        ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]', "a.json: continues after the 1 elements of its array .*jq"),
        ("a.json", b'[\n{"text": "x"},\n', "a.json: not JSON after 1 elements of its array .*jq"),
        ("a.jsonl", b'[\n{"text": "x"}]\n', "a.jsonl:1: not JSON .*jq"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: damaged gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 100, mtime=0)[:-20], "a.jsonl.gz: damaged gzip"),
        ("a.parquet", b"no parquet", "a.parquet: not Parquet, or damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, payload: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(UsageError, match=message):
        _documents(tmp_path)


def test_parquet_without_the_column_and_with_other_types(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a.parquet: row 1: no field 'text'.*has 'body', 'id'.*text_field=body"):
        _documents(tmp_path)
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a.parquet: row 1: 'text' is a int, wanted text"):
        _documents(tmp_path)
    parquet.write_table(pa.table({"text": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a.parquet: row 2: no field 'text'"):
        _documents(tmp_path)


def test_parquet_that_is_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [str(i) * 50 for i in range(2000)]}), path, compression="zstd")
    payload = bytearray(path.read_bytes())
    payload[40:400] = bytes(360)
    path.write_bytes(payload)
    with pytest.raises(UsageError, match=r"a.parquet: not Parquet, or damaged"):
        _documents(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'kd-workspace\[parquet\]'"):
        _documents(tmp_path)


def test_large_files_are_read_row_by_row(tmp_path: Path) -> None:
    row: dict[str, Any] = {"text": "x" * 1000}
    _lines(tmp_path / "a.jsonl", *[row] * 10_000)
    tracemalloc.start()
    assert sum(1 for _ in Corpus(str(tmp_path)).documents()) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
