"""What rows of data sets hold reaches the chat template as transformers gives it to one, or is refused by name."""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from data.corpus.chat.chat_template import ChatTemplate
from data.corpus.chat.conversations import Conversation, Message, parse_conversation
from data.corpus.corpus import Corpus
from data.corpus.documents import Document
from data.corpus.encoding import Encoder
from data.text_lines import BadRowError
from tests.tiny import Tiny, make_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
CALLS = "{% for c in m.tool_calls %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}" + CALLS + "<|im_end|>\n{% endfor %}" + PROMPT
)
ASKS: Message = {"role": "user", "content": "go"}
SAYS: Message = {"role": "assistant", "content": "Look there."}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}


def _calls(**arguments: Any) -> Message:
    function = {"name": "look", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def _folder(tiny: Tiny, path: Path, template: str = CHATML) -> Path:
    path.mkdir(exist_ok=True)
    tokenizer = make_tokenizer(path, [file.read_text() for file in sorted(tiny.corpus.iterdir())])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(template)
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    return path


def _rows(path: Path, rows: list[dict[str, Any]]) -> Corpus:
    if path.suffix == ".parquet":
        keys = {key for row in rows for key in row}
        parquet.write_table(pa.Table.from_pylist([dict.fromkeys(keys) | row for row in rows]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus(str(path))


def _texts(folder: Path, corpus: Corpus) -> list[str]:
    encoder = Encoder(folder)
    return [encoder.tokenizer.decode(each.token_ids.tolist()) for each in encoder.encode(corpus.documents())]


def _theirs(folder: Path, *args: Any, **settings: Any) -> str:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(*args, tokenize=False, **settings))


def _scored(template: str, messages: list[Message], scored_from: int = 0) -> list[str]:
    """The texts of the scored turns, by a template with three special tokens."""
    found = ChatTemplate(template, {}, ("<|im_start|>", "<|im_end|>", "</s>"), "t.jinja")
    text, spans = found.render(parse_conversation(messages, "x")._replace(scored_from=scored_from), "x.jsonl:1")
    return [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_of_each_format_are_rendered_as_transformers_renders_them(tiny: Tiny, tmp_path: Path, ending: str) -> None:
    folder = _folder(tiny, tmp_path / "teacher")
    chats = [[ASKS, _calls(city="Rome")], [ASKS, _calls(unit="C", days=3), {"role": "tool", "content": "sun"}, SAYS]]
    rows = [{"messages": chats[0], "tools": [SCHEMA]}, {"messages": chats[1]}, {"messages": chats[1], "tools": []}]
    texts = _texts(folder, _rows(tmp_path / f"a.{ending}", rows))
    assert texts == [_theirs(folder, chats[0], tools=[SCHEMA]), *[_theirs(folder, chats[1])] * 2]
    assert '{"city": "Rome"}' in texts[0]


def test_tools_may_be_json_in_a_text_and_stand_beside_a_prompt(tiny: Tiny, tmp_path: Path) -> None:
    folder = _folder(tiny, tmp_path / "teacher")
    tools = [{**SCHEMA, "default": None}]  # a null in JSON that was written as text is meant
    rows = [
        {"messages": [ASKS, SAYS], "tools": json.dumps(tools)},
        {"prompt": "go", "completion": "Look there.", "tools": json.dumps(tools)},
        {"messages": [ASKS, SAYS], "tools": ""},
    ]
    with_tools, without = _theirs(folder, [ASKS, SAYS], tools=tools), _theirs(folder, [ASKS, SAYS])
    assert _texts(folder, _rows(tmp_path / "a.parquet", rows)) == [with_tools, with_tools, without]


@pytest.mark.parametrize("beside", [True, False])
def test_tools_go_to_the_template_that_is_named_for_them(tiny: Tiny, tmp_path: Path, beside: bool) -> None:
    folder = _folder(tiny, tmp_path / "teacher")
    for_tools = "{{ tools | length }} tools\n" + CHATML
    before = ChatTemplate.read(folder, ()).fingerprint()
    if beside:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(for_tools)
    else:
        (folder / "chat_template.jinja").unlink()
        named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": for_tools}]
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    rows = [{"messages": [ASKS, SAYS]}, {"messages": [ASKS, SAYS], "tools": [SCHEMA]}]
    texts = _texts(folder, _rows(tmp_path / "a.jsonl", rows))
    assert texts == [_theirs(folder, [ASKS, SAYS]), _theirs(folder, [ASKS, SAYS], tools=[SCHEMA])]
    assert texts[1].startswith("1 tools")
    template = ChatTemplate.read(folder, ())
    template.render(Conversation([ASKS, SAYS]), "x")
    assert template.fingerprint() == before
    template.render(Conversation([ASKS, SAYS], tools=[SCHEMA]), "x")
    assert template.fingerprint() != before


def test_tools_are_part_of_a_documents_content_where_there_are_some() -> None:
    known = Document("a", Conversation([ASKS, SAYS], 1)).digest()
    assert known == hashlib.sha256(json.dumps([[ASKS, SAYS], 1], sort_keys=True).encode()).digest()[:16]
    assert known != Document("a", Conversation([ASKS, SAYS], 1, [SCHEMA])).digest()


@pytest.mark.parametrize("name", ["qwen2.5", "smollm2", "llama-3.1", "gemma-3"])
def test_parts_are_joined_unless_the_template_takes_parts(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = _folder(tiny, tmp_path / "teacher", (TEMPLATES / f"{name}.jinja").read_text())
    parts = [{"type": "text", "text": "Who sees"}, {"type": "text", "text": "the owl?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "I."}]}]
    joined = [{"role": "user", "content": "Who sees\nthe owl?"}, {"role": "assistant", "content": "I."}]
    [text] = _texts(folder, _rows(tmp_path / "a.parquet", [{"messages": chat}]))
    assert text == _theirs(folder, chat if name == "gemma-3" else joined)
    assert "Who sees" in text


def test_values_that_json_does_not_have_do_no_harm_until_a_template_reads_them(tiny: Tiny, tmp_path: Path) -> None:
    at = datetime.datetime(2024, 1, 2)
    rows = [{"messages": [{**ASKS, "at": at}, {**SAYS, "at": at}, {**ASKS, "at": at}]}]
    corpus = _rows(tmp_path / "a.parquet", rows)
    # Mistral's template compares messages with each other.
    for name in ("qwen3", "mistral-7b-v0.3"):
        folder = _folder(tiny, tmp_path / name, (TEMPLATES / f"{name}.jinja").read_text())
        assert _texts(folder, corpus) == [_theirs(folder, [ASKS, SAYS, ASKS])]
    for reading in ("{{ messages[0].at }}", "{{ messages[0] | tojson }}", "{{ 'x' ~ messages[0].at }}"):
        folder = _folder(tiny, tmp_path / "reads", reading + CHATML)
        with pytest.raises(BadRowError, match=r"refuses the conversation: 'at' is a datetime") as caught:
            _texts(folder, corpus)
        assert str(caught.value).startswith(f"{tmp_path}/a.parquet: row 1: ")
        assert caught.value.reason == "refused by the chat template"


def test_refusals_name_the_file_the_row_and_the_message(tiny: Tiny, tmp_path: Path) -> None:
    folder = _folder(tiny, tmp_path / "teacher", CHATML.replace(CALLS, ""))
    rows = [{"messages": [ASKS, SAYS]}, {"messages": [ASKS, _calls(city="Rome")]}]
    with pytest.raises(
        BadRowError, match=r"messages\[1\]: the chat template writes nothing of this tool call"
    ) as caught:
        _texts(folder, _rows(tmp_path / "a.jsonl", rows))
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:2: ")
    assert caught.value.reason == "tool call that the template does not write"


def test_a_call_that_a_template_with_generation_blocks_does_not_write_is_refused() -> None:
    blocks = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert _scored(blocks, [ASKS, SAYS]) == ["Look there.<|im_end|>"]
    with pytest.raises(BadRowError, match="writes nothing of this tool call"):
        _scored(blocks, [ASKS, _calls(city="Rome")])


@pytest.mark.parametrize("name", ["qwen2.5", "smollm3"])
def test_a_turn_of_weight_0_is_context_alone(name: str) -> None:
    """As OpenAI's files for fine-tuning have it."""
    template = (TEMPLATES / f"{name}.jinja").read_text()
    chat = [ASKS, {**SAYS, "weight": 0}, ASKS, {"role": "assistant", "content": "And here.", "weight": 1}]
    [scored] = _scored(template, chat)
    assert "And here." in scored


def test_templates_get_one_date_or_their_own_default() -> None:
    llama, smollm3 = ((TEMPLATES / f"{name}.jinja").read_text() for name in ("llama-3.2", "smollm3"))
    for source in (llama, llama.replace("strftime_now is defined", "false")):
        text, _ = ChatTemplate(source, {}, (), "t").render(Conversation([ASKS, SAYS]), "x")
        assert "Today Date: 26 Jul 2024\n" in text
    text, _ = ChatTemplate(smollm3, {}, (), "t").render(Conversation([ASKS, SAYS]), "x")
    assert "Today Date: 26 July 2024\n" in text


OPENS_REASONING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NAMES_AGAIN = CHATML.replace(
    "{{ m.role }}\n", "{{ m.role if m.role != 'tool' else messages[loop.index0 - 1].tool_calls[0].function.name }}\n"
)
RESULTS_WITHIN = """
{%- for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant
{{ m.tool_calls[0].function.name }} gave {{ messages[loop.index0 + 1].content }}. {{ m.content }}<|im_end|>
{% elif m.role != 'tool' %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ENDS_APART = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ '</s>' if loop.last else '<|im_end|>' }}"
    "{% endfor %}" + PROMPT
)
RESULT: Message = {"role": "tool", "content": "sun"}


@pytest.mark.parametrize(
    ("template", "chat", "scored"),
    [
        (OPENS_REASONING, [ASKS, SAYS, ASKS, SAYS], ["Look there.<|im_end|>"] * 2),
        (OPENS_REASONING, [SAYS, ASKS], ["Look there.<|im_end|>"]),
        (NAMES_AGAIN, [ASKS, _calls(a=1), RESULT, SAYS], ['look{"a": 1}<|im_end|>', "Look there.<|im_end|>"]),
        (ENDS_APART, [ASKS, SAYS, ASKS, SAYS], ["Look there.<|im_end|>", "Look there.</s>"]),
    ],
)
def test_turns_are_found_in_templates_of_all_kinds(template: str, chat: list[Message], scored: list[str]) -> None:
    assert _scored(template, chat) == scored


def test_a_turn_that_holds_the_text_of_another_message_is_refused() -> None:
    with pytest.raises(BadRowError, match=r"x.jsonl:1: messages\[1\]: what the assistant said cannot be told"):
        _scored(RESULTS_WITHIN, [ASKS, {**_calls(a=1), "content": "So."}, RESULT, SAYS])


def test_reasoning_alone_is_no_answer_where_the_template_drops_it() -> None:
    template = (TEMPLATES / "qwen3.jinja").read_text()
    thinks = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n"}
    assert _scored(template, [ASKS, thinks]) == ["<think>\nHm.\n</think>\n\n<|im_end|>"]
    with pytest.raises(BadRowError, match=r"messages\[1\]: what the assistant said cannot be told"):
        _scored(template, [ASKS, thinks, ASKS, SAYS])


def test_a_prompt_of_turns_like_the_completion_is_not_scored() -> None:
    template = (TEMPLATES / "qwen3.jinja").read_text()
    thinks = {**SAYS, "reasoning_content": "Hm."}
    assert _scored(template, [ASKS, thinks, ASKS, thinks, ASKS, thinks], scored_from=5) == [
        "<think>\nHm.\n</think>\n\nLook there.<|im_end|>"
    ]
    assert np.all([_scored(template, [ASKS, thinks] * n, 2 * n - 1) for n in range(1, 6)])
