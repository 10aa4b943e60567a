"""Data sets as they are published: read as they are or by the setting that the message names, alike in every format."""

import csv
import datetime
import decimal
import gzip
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import ipc, parquet

from data.corpus.chat.conversations import Conversation
from data.corpus.corpus import Corpus
from experiments.config.paths import check_values, set_path
from experiments.half_depth import quickstart_export
from kd_core.errors import UsageError

Rows = list[dict[str, Any]]
ASK, TELL = {"role": "user", "content": "Who sees the fox?"}, {"role": "assistant", "content": "The owl."}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = [ASK, TELL]


def _turns(*messages: dict[str, str], role: str = "from", content: str = "value") -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{role: names.get(m["role"], m["role"]), content: m["content"]} for m in messages]


# Of each layout its rows as the data set has them, what they are, and the setting that is needed, if any.
LAYOUTS: dict[str, tuple[Rows, list[Any], dict[str, Any]]] = {
    "ShareGPT": ([{"id": "x_0", "conversations": _turns(ASK, TELL, ASK, TELL)}], [PAIR * 2], {}),
    "ShareGPT with its system": ([{"conversations": _turns(*PAIR), "system": "Be brief."}], [[SYSTEM, *PAIR]], {}),
    "OpenHermes": (
        [
            {"conversations": _turns(SYSTEM, ASK, TELL), "source": "x", "system_prompt": None, "idx": 1},
            {"conversations": _turns(ASK, TELL), "source": None, "system_prompt": None, "idx": 2},
        ],
        [[SYSTEM, *PAIR], PAIR],
        {},
    ),
    "LMSYS": ([{"conversation": PAIR, "model": "m", "turn": 1}], [PAIR], {}),
    "Alpaca": (
        [
            {"instruction": "Who sees the fox?", "input": "", "output": "The owl."},
            {"instruction": "Who?", "input": "The fox.", "output": "The owl."},
        ],
        [PAIR, [{"role": "user", "content": "Who?\n\nThe fox."}, TELL]],
        {},
    ),
    "Alpaca's Parquet": (
        [
            {
                "instruction": "Who?",
                "input": "The fox.",
                "output": "The owl.",
                "text": "Below is one.\n\n### Instruction:\nWho?\n\n### Input:\nThe fox.\n\n### Response:\nThe owl.",
            }
        ],
        [[{"role": "user", "content": "Who?\n\nThe fox."}, TELL]],
        {},
    ),
    "Dolly": (
        [{"instruction": "Who sees the fox?", "context": "", "response": "The owl.", "category": "open_qa"}],
        [PAIR],
        {},
    ),
    "OpenOrca": (
        [
            {"id": "1", "system_prompt": "Be brief.", "question": "Who sees the fox?", "response": "The owl."},
            {"id": "2", "system_prompt": "", "question": "Who sees the fox?", "response": "The owl."},
        ],
        [[SYSTEM, *PAIR], PAIR],
        {},
    ),
    "messages": ([{"messages": PAIR, "prompt": "Who sees the fox?", "prompt_id": "1"}], [PAIR], {}),
    "prompt and completion": ([{"prompt": ASK["content"], "completion": "The owl."}], [Conversation(PAIR, 1)], {}),
    "lists of them": ([{"prompt": [SYSTEM, ASK], "completion": [TELL]}], [Conversation([SYSTEM, *PAIR], 2)], {}),
    "text": ([{"text": "The owl sees.", "meta": {"set": None}}], ["The owl sees."], {}),
    "question and answer": (
        [{"question": ASK["content"], "answer": "The owl."}],
        [Conversation(PAIR, 1)],
        {"fields": {"prompt": "question", "completion": "answer"}},
    ),
    "a dialogue of its own": (
        [{"dialogue": _turns(SYSTEM, ASK, TELL, role="speaker", content="utterance"), "title": "x"}],
        [[SYSTEM, *PAIR]],
        {"fields": {"messages": "dialogue", "role": "speaker", "content": "utterance"}},
    ),
    "another text": (
        [{"id": "12", "body": "The owl sees the fox."}],
        ["The owl sees the fox."],
        {"text_field": "body"},
    ),
    "ShareGPT by another name": ([{"items": _turns(ASK, TELL)}], [PAIR], {"fields": {"messages": "items"}}),
    "chosen conversations": (
        [{"prompt": "Who sees the fox?", "chosen": PAIR, "rejected": [ASK]}],
        [PAIR],
        {"fields": {"messages": "chosen"}},
    ),
    "preferences": (
        [{"prompt": "Who sees the fox?", "chosen": "The owl.", "rejected": "No."}],
        [Conversation(PAIR, 1)],
        {"fields": {"prompt": "prompt", "completion": "chosen"}},
    ),
}


def _json_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _arrow(path: Path, rows: Rows, new: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "rows.jsonl": _json_lines,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0)
    ),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(
        b"".join(zstandard.compress(json.dumps(row).encode() + b"\n") for row in rows)
    ),
    "rows.parquet": lambda path, rows: parquet.write_table(pa.Table.from_pylist(rows), path),
    "stream.arrow": lambda path, rows: _arrow(path, rows, ipc.new_stream),
    "file.arrow": lambda path, rows: _arrow(path, rows, ipc.new_file),
}


def _contents(path: Path, **settings: Any) -> list[Any]:
    found = [document.content for document in Corpus(str(path), **settings).documents()]
    return [c.messages if isinstance(c, Conversation) and not c.scored_from else c for c in found]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_layout_in_every_format_or_by_the_setting_that_the_message_names(
    tmp_path: Path, layout: str, name: str
) -> None:
    rows, wanted, settings = LAYOUTS[layout]
    WRITERS[name](tmp_path / name, rows)
    if settings:
        with pytest.raises(UsageError, match=rf"{name}(: row |:)1: no field") as refused:
            _contents(tmp_path)
        config = quickstart_export()
        [pasted] = shlex.split(str(refused.value).partition(" Is it ")[2].rstrip("?"))
        set_path(config, pasted.removeprefix("--config="))
        set_path(config, pasted.removeprefix("--config="))  # also where another value stands
        check_values(config, recorded=True)
        assert {key: getattr(config.corpus, key) for key in settings} == settings
    assert _contents(tmp_path, **settings) == wanted


def test_a_text_beside_a_conversation_that_does_not_hold_it_needs_a_word(tmp_path: Path) -> None:
    _json_lines(tmp_path / "a.jsonl", [{"instruction": "Who?", "output": "The owl.", "text": "Another one."}])
    with pytest.raises(UsageError, match=r"has 'text' and 'instruction' and 'output'.*content=text or instruction"):
        _contents(tmp_path)
    assert _contents(tmp_path, content="text") == ["Another one."]
    assert _contents(tmp_path, content="instruction")[0][1] == TELL
    with pytest.raises(UsageError, match=r"no field 'question'; wanted it for corpus.content=question"):
        _contents(tmp_path, content="question")


CALL = {"name": "look", "arguments": {"city": "Rome"}}


def test_roles_of_published_sets(tmp_path: Path) -> None:
    turns = [
        {"from": "Human", "value": "Look."},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "Sun."},
        {"from": "gpt", "value": "It shines.", "weight": 1},
    ]
    _json_lines(tmp_path / "a.jsonl", [{"conversations": turns}])
    [messages] = _contents(tmp_path)
    assert not messages[1].pop("content", "")
    assert messages == [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "Sun."},
        {"role": "assistant", "content": "It shines.", "weight": 1},
    ]
    turns[1]["value"] = "look(Rome)"
    _json_lines(tmp_path / "a.jsonl", [{"conversations": turns}])
    with pytest.raises(UsageError, match=r"a.jsonl:1: conversations\[1\]: a function call that is not JSON"):
        _contents(tmp_path)


def test_earlier_turns_of_alpaca(tmp_path: Path) -> None:
    row = {
        "instruction": "Who?",
        "input": "",
        "output": "The owl.",
        "history": [["Hear?", "No."]],
        "system": "Be brief.",
    }
    _json_lines(tmp_path / "a.jsonl", [row])
    [messages] = _contents(tmp_path)
    assert [m["content"] for m in messages] == ["Be brief.", "Hear?", "No.", "Who?", "The owl."]
    _json_lines(tmp_path / "a.jsonl", [{**row, "system": ["Be brief."]}])
    with pytest.raises(UsageError, match=r"a.jsonl:1: 'system' is a list, wanted text"):
        _contents(tmp_path)
    _json_lines(tmp_path / "a.jsonl", [{**row, "history": [["Hear?"]]}])
    with pytest.raises(UsageError, match=r"a.jsonl:1: 'history' is not a list of pairs"):
        _contents(tmp_path)


def test_csv_with_quotes_delimiters_and_messages_as_json(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "completion"], ["Who, then?", "The\n“owl”."], ["", "none"]])
    with (tmp_path / "b.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["text", "id"], ["a\tb", 1]])
    (tmp_path / "c.csv").write_text("text;id\nfirst, second;1\n")
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(PAIR)]])
    found = list(Corpus(str(tmp_path), on_bad_row="skip").documents(bad := Corpus("", on_bad_row="skip").bad_rows()))
    assert [each.name for each in found] == ["a.csv:1", "b.tsv:1", "c.csv:1", "d.csv:1"]
    assert isinstance(found[0].content, Conversation)
    assert found[0].content.messages[1]["content"] == "The\n“owl”."
    assert [each.content for each in found[1:]] == ["a\tb", "first, second", Conversation(PAIR)]
    assert bad.counts() == {"no field that is known": 1}
    (tmp_path / "e.csv").write_bytes(b"text,id\nfine,1\nx,y,z\ncaf\xe9,2\n")
    with pytest.raises(UsageError, match=r"e.csv: row 2: has 3 cells, the header 2"):
        _contents(tmp_path / "e.csv")
    (tmp_path / "e.csv").write_bytes(b"text,id\ncaf\xe9,2\n")
    with pytest.raises(UsageError, match=r"e.csv: row 1: not UTF-8"):
        _contents(tmp_path / "e.csv")


def test_arrays_of_json_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.corpus.file_rows.JSON_CHUNK_BYTES", 7)
    rows = [{"text": f"ö {'x' * (i % 30)} ]}}, {i}", "n": i * 10**9} for i in range(60)]
    (tmp_path / "a.json").write_text("\ufeff\n " + json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert _contents(tmp_path) == [row["text"] for row in rows]
    (tmp_path / "a.json").write_text(json.dumps([rows[0], 3, {"text": "\ud83d"}]))
    with pytest.raises(UsageError, match=r"a.json: row 2: holds a int"):
        _contents(tmp_path)
    bad = Corpus("", on_bad_row="skip").bad_rows()
    assert len(list(Corpus(str(tmp_path)).documents(bad))) == 1
    assert bad.counts() == {"not a JSON object": 1, "half a surrogate pair": 1}


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    """As `datasets` 4 writes it: a stream a shard, and tables left over from transformations beside them."""
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    for i in range(2):
        _arrow(folder / f"data-0000{i}-of-00002.arrow", [{"text": f"shard {i}"}], ipc.new_stream)
    _arrow(folder / "cache-0123456789abcdef.arrow", [{"text": "left over"}], ipc.new_stream)
    names = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_fingerprint": "x", "_split": "train"}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    (folder.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert _contents(tmp_path / "saved") == _contents(folder) == ["shard 0", "shard 1"]
    (folder / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(UsageError, match=r"state.json: damaged"):
        _contents(folder)


def test_times_decimals_and_bytes_harm_only_where_they_are_read(tmp_path: Path) -> None:
    others = {
        "at": datetime.datetime(2024, 1, 2),
        "price": decimal.Decimal("1.5"),
        "raw": b"\xff",
        "day": datetime.date(1, 1, 1),
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"text": "x", **others}]), path)
    assert _contents(path) == ["x"]
    for field, kind in (("at", "datetime"), ("price", "Decimal"), ("raw", "bytes"), ("day", "date")):
        with pytest.raises(UsageError, match=rf"a.parquet: row 1: '{field}' is a {kind}, wanted text"):
            _contents(path, text_field=field)
    far = pa.array([0, 2**62], pa.timestamp("us"))  # no year that Python's calendar has
    parquet.write_table(pa.table({"text": ["x", "y"], "at": far}), path)
    assert _contents(path) == ["x", "y"]
    turns = pa.array([[{**ASK, "at": 0}, TELL], [{**ASK, "at": 2**62}, TELL]])
    turns = turns.cast(pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "at": pa.timestamp("us")})))
    parquet.write_table(pa.table({"messages": turns}), path)
    bad = Corpus("", on_bad_row="skip").bad_rows()
    assert len(list(Corpus(str(path)).documents(bad))) == 1
    assert [(each.row, each.reason) for each in bad.bad] == [("a.parquet:2", "a value that cannot be read")]


def test_nulls_within_fields_are_not_there(tmp_path: Path) -> None:
    def call(**arguments: object) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    rows = [
        {"messages": [ASK, call(city="Rome")], "text": None},
        {"messages": [ASK, call(unit="C", days=[1, 2])], "text": None},
    ]
    found: list[list[Any]] = []
    for name, write in WRITERS.items():
        write(tmp_path / name, rows)
        found.append([document.content for document in Corpus(str(tmp_path / name)).documents()])
    assert all(contents == found[0] for contents in found)
    assert found[0][0].messages[1]["tool_calls"] == call(city="Rome")["tool_calls"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "wanted a field of the rows for 'text'"),
        ({"prompt": "q"}, "for both 'prompt' and 'completion'"),
        ({"text": "t", "messages": "m"}, "wanted"),
        ({"question": "q", "answer": "a"}, "wanted"),
    ],
)
def test_a_mapping_that_names_no_document_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=rf"corpus.fields: got .*{message}"):
        Corpus("x", fields=fields)


@pytest.mark.parametrize("other", [{"content": "messages"}, {"text_field": "body"}])
def test_a_mapping_beside_another_setting_of_the_layout_is_refused(other: dict[str, Any]) -> None:
    [(name, value)] = other.items()
    with pytest.raises(UsageError, match=rf"corpus.fields and corpus.{name}: got .*'dialogue'.* and '{value}'"):
        Corpus("x", fields={"messages": "dialogue"}, **other)


def test_a_field_that_is_missing_and_a_system_message_by_name(tmp_path: Path) -> None:
    fields = {"prompt": "q", "completion": "a", "system": "s"}
    _json_lines(tmp_path / "a.jsonl", [{"q": "Who?", "a": "The owl.", "s": "Be brief."}, {"q": "Who?", "s": "x"}])
    documents = Corpus(str(tmp_path), fields=fields).documents()
    first = next(documents).content
    assert isinstance(first, Conversation)
    assert (first.messages[0], first.scored_from) == (SYSTEM, 2)
    with pytest.raises(UsageError, match=r"a.jsonl:2: no field 'a'; wanted it for corpus.fields"):
        next(documents)
    assert Corpus(str(tmp_path), fields=fields).identity()["fields"] == fields
    assert "fields" not in Corpus(str(tmp_path)).identity()


def test_a_system_message_beside_messages_and_completions_is_taken(tmp_path: Path) -> None:
    rows = [
        {"system": "Be brief.", "messages": PAIR},
        {"system_prompt": "Be brief.", "prompt": ASK["content"], "completion": TELL["content"]},
        {"system": "Be long.", "messages": [SYSTEM, *PAIR]},
    ]
    _json_lines(tmp_path / "a.jsonl", rows)
    found = [document.content for document in Corpus(str(tmp_path / "a.jsonl")).documents()]
    assert [content.messages for content in found if not isinstance(content, str)] == [[SYSTEM, *PAIR]] * 3
