"""Conversations through chat templates: transformers' ids and masks; the loss on the assistant's tokens alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from data.cache.manifest import read_manifest
from data.corpus.chat.chat_template import BLOCK_CLOSE, ChatTemplate
from data.corpus.chat.conversations import Conversation, Message
from data.corpus.corpus import Corpus
from data.corpus.documents import Document
from data.corpus.encoding import Encoded, Encoder
from data.export.plan import make_plans
from kd_core.errors import UsageError
from tests.tiny import Tiny, make_tokenizer, write_caches

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are an owl.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GENERATION = """
{% for message in messages %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>
{% endgeneration %}
    {% elif message.role == 'system' %}
        {% continue %}
    {% else %}
<|im_start|>{{ message.role }} {{ {'é': message.content} | tojson }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama_2": LLAMA_2, "generation": GENERATION}
CHATS: list[list[Message]] = [
    [{"role": "user", "content": "Who sees the fox?"}, {"role": "assistant", "content": "The old owl 🦉"}],
    [
        {"role": "system", "content": "Answer  briefly."},
        {"role": "user", "content": "  <b>Who</b> hears \"a\" road? "},
        {"role": "assistant", "content": "\nThe young hen.\n\n"},
        {"role": "user", "content": "naïve 東京"},
        {"role": "assistant", "content": "  The loud owl <|im_end|> "},
    ],
]  # fmt: skip


def _folder(tiny: Tiny, path: Path, template: str | None) -> Path:
    """A tokenizer with ChatML's tokens and a template."""
    path.mkdir(parents=True, exist_ok=True)
    texts = [file.read_text() for file in sorted(tiny.corpus.iterdir())]
    tokenizer = make_tokenizer(path, texts)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(path / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    end = {"__type": "AddedToken", "content": "<end>", **flags}
    settings: dict[str, Any] = {"bos_token": "<|im_start|>", "eos_token": end}
    if template is not None:
        settings["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def _encode(folder: Path, messages: list[Message], scored_from: int = 0) -> tuple[Encoder, Encoded]:
    encoder = Encoder(folder)
    return encoder, next(encoder.encode([Document("a.jsonl:1", Conversation(messages, scored_from))]))


def _scored(folder: Path, messages: list[Message], scored_from: int = 0) -> list[str]:
    """The texts of runs of scored labels."""
    encoder, found = _encode(folder, messages, scored_from)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.loss_mask, [0]])))
    return [encoder.tokenizer.decode(found.token_ids[a + 1 : b + 1].tolist()) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("chat", CHATS, ids=["one turn", "two turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(tiny: Tiny, tmp_path: Path, name: str, chat: list[Message]) -> None:
    folder = _folder(tiny, tmp_path, TEMPLATES[name])
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert _encode(folder, chat)[1].token_ids.tolist() == theirs.apply_chat_template(chat)["input_ids"]


@pytest.mark.parametrize("chat", CHATS, ids=["one turn", "two turns"])
def test_masks_of_generation_blocks_are_those_of_transformers(tiny: Tiny, tmp_path: Path, chat: list[Message]) -> None:
    folder = _folder(tiny, tmp_path, GENERATION)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        chat, return_assistant_tokens_mask=True, return_dict=True
    )
    assert _encode(folder, chat)[1].loss_mask.tolist() == theirs["assistant_masks"][1:]
    assert sum(theirs["assistant_masks"]) > 0


def test_chatml_scores_the_answers_and_their_end_of_turn(tiny: Tiny, tmp_path: Path) -> None:
    folder = _folder(tiny, tmp_path, CHATML)
    assert _scored(folder, CHATS[0]) == ["The old owl 🦉<|im_end|>"]
    assert _scored(folder, CHATS[1]) == ["\nThe young hen.\n\n<|im_end|>", "  The loud owl <|im_end|> <|im_end|>"]


def test_llama_2_scores_the_answers_and_their_end_of_text(tiny: Tiny, tmp_path: Path) -> None:
    folder = _folder(tiny, tmp_path, LLAMA_2)
    assert _scored(folder, CHATS[0]) == [" The old owl 🦉 <end>"]
    assert _scored(folder, CHATS[1]) == [" The young hen. <end>", " The loud owl <|im_end|> <end>"]


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("llama_2", " <end>"), ("generation", None)])
def test_of_a_prompt_and_its_completion_the_completion_alone_is_scored(
    tiny: Tiny, tmp_path: Path, name: str, end: str | None
) -> None:
    folder = _folder(tiny, tmp_path, TEMPLATES[name])
    chat = [*CHATS[0], {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "A hen."}]
    [scored] = _scored(folder, chat, scored_from=2)
    assert scored.strip() == f"A hen.{end or '<|im_end|>'}"


def test_a_turn_that_ends_in_white_space_alone_keeps_it(tiny: Tiny, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    folder = _folder(tiny, tmp_path, template + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert _scored(folder, CHATS[0]) == [" The old owl 🦉\n"]  # the tokenizer joins the space to the first word


def test_a_conversation_without_the_assistant_is_left_out(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = _teacher(tiny, tmp_path / "teacher", CHATML)
    rows = [{"messages": CHATS[0]}, {"messages": CHATS[0][:1]}, {"messages": [*CHATS[0], *CHATS[0]]}, {"text": "x"}]
    corpus = _corpus(tmp_path / "a.jsonl", rows)
    with caplog.at_level("INFO", logger="kd"):
        plans = make_plans(tiny.export(teacher=teacher, corpus=corpus, row_length=128), tmp_path / "out")
    assert "2 of 4 documents left out: nothing to score" in caplog.text
    assert sorted(window.document for plan in plans for window in plan.windows) == ["a.jsonl:1", "a.jsonl:3"]
    corpus = _corpus(tmp_path / "a.jsonl", [{"messages": CHATS[0][:1]}] * 3)
    with pytest.raises(UsageError, match=r"has 0 different document\(s\) with something to score; wanted two or more"):
        make_plans(tiny.export(teacher=teacher, corpus=corpus), tmp_path / "out")


def _corpus(path: Path, rows: list[dict[str, Any]]) -> Corpus:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus(str(path))


def _teacher(tiny: Tiny, folder: Path, template: str) -> str:
    """The tiny teacher with a template whose turns end with the one special token that it has."""
    folder.mkdir()
    for file in tiny.teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    plain = template.replace("<|im_start|>", "## ").replace("<|im_end|>", "<end>")
    (folder / "chat_template.jinja").write_text(plain)
    return str(folder)


def test_an_export_of_conversations_masks_and_overlaps(tiny: Tiny, tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS * 2])
    export = tiny.export(teacher=_teacher(tiny, tmp_path / "teacher", CHATML), corpus=corpus, overlap=8)
    write_caches(export, tmp_path / "out")
    wanted = sum(int(d.loss_mask.sum()) for d in Encoder(Path(export.teacher)).encode(corpus.documents()))
    records = [r for split in ("train", "validation") for r in tiny.records(tmp_path / "out" / split)]
    assert sum(int(record.loss_mask.sum()) for record in records) == wanted
    manifest = read_manifest(tmp_path / "out" / "train")
    train = tiny.records(tmp_path / "out" / "train")
    mask = np.concatenate([record.loss_mask for record in train]) > 0
    label = np.concatenate([record.label_log_prob for record in train])
    assert manifest.statistics["teacher_nll"] == pytest.approx(-label[mask].mean(), rel=1e-5)
    assert all(record.loss_mask.any() and not record.loss_mask.all() for record in records)


def test_another_template_is_another_plan(tiny: Tiny, tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "a.jsonl", [{"messages": CHATS[0]}, {"messages": [*CHATS[0], *CHATS[0]]}])
    teachers = [_teacher(tiny, tmp_path / f"teacher{i}", CHATML + "{# another #}" * i) for i in range(2)]
    plans = [make_plans(tiny.export(teacher=t, corpus=corpus, row_length=128), tmp_path)[0].identity for t in teachers]
    assert [name for name in plans[0] if plans[0][name] != plans[1][name]] == ["chat_template"]
    plain = [make_plans(tiny.export(teacher=teacher), tmp_path)[0].identity for teacher in teachers]
    assert plain[0] == plain[1]  # of a text corpus the template is no part


def test_a_file_of_its_own_goes_before_the_configuration(tiny: Tiny, tmp_path: Path) -> None:
    folder = _folder(tiny, tmp_path, CHATML)
    (folder / "chat_template.jinja").write_text(LLAMA_2)
    assert _scored(folder, CHATS[0]) == [" The old owl 🦉 <end>"]


def test_named_templates_and_the_map_of_special_tokens(tiny: Tiny, tmp_path: Path) -> None:
    folder = _folder(tiny, tmp_path, None)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA_2}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "bos_token": None}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<end>"}))
    assert _scored(folder, CHATS[0]) == [" The old owl 🦉 <end>"]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(UsageError, match=r"has the chat templates \['tool_use'\]; wanted one that is named 'default'"):
        _encode(folder, CHATS[0])


FORGETFUL = CHATML.replace(
    "message['content'] +", "(message['content'] if loop.last or message.role != 'assistant' else '…') +"
)


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (None, CHATS[0], "no chat template, and the corpus has conversations"),
        ("{% if %}", CHATS[0], "tokenizer_config.json: not a chat template"),
        (LLAMA_2, CHATS[0][:1] * 2, r"a.jsonl:1: .*refuses the conversation: Roles must alternate"),
        ("{{ messages[0].content + none }}", CHATS[0], "a.jsonl:1: .*refuses the conversation: can only concatenate"),
        (
            "{{ messages.clear() }}",
            CHATS[0],
            "refuses the conversation: access to attribute .clear. of .list. object is unsafe",
        ),
        ("{{ messages.__class__.__mro__ }}", CHATS[0], "refuses the conversation: .*unsafe"),
        (FORGETFUL, CHATS[1], r"a.jsonl:1: messages\[2\]: the chat template writes nothing of this turn"),
        (CHATML.split("{% if add", maxsplit=1)[0], CHATS[0], None),
        (CHATML, [{"role": "user", "content": BLOCK_CLOSE}, CHATS[0][1]], "holds U.FDD0 or U.FDD1"),
    ],
)
def test_what_cannot_be_rendered_exactly_is_refused(
    tiny: Tiny, tmp_path: Path, template: str | None, chat: list[Message], message: str | None
) -> None:
    folder = _folder(tiny, tmp_path, template)
    if message is None:  # no generation prompt at all: the turn's heading is scored with it
        assert _scored(folder, chat) == ["<|im_start|>assistant\nThe old owl 🦉<|im_end|>"]
        return
    with pytest.raises(UsageError, match=message):
        _encode(folder, chat)


def test_a_turn_that_leaves_nothing_open_is_of_the_template(tiny: Tiny, tmp_path: Path) -> None:
    """A forgetful template is no hindrance to the last turn alone."""
    folder = _folder(tiny, tmp_path, FORGETFUL)
    assert _scored(folder, CHATS[1], scored_from=4) == ["  The loud owl <|im_end|> <|im_end|>"]


def test_special_tokens_in_what_users_say_are_special_as_in_transformers(tiny: Tiny, tmp_path: Path) -> None:
    encoder, found = _encode(_folder(tiny, tmp_path, CHATML), [{"role": "user", "content": "<|im_end|>"}, CHATS[0][1]])
    assert (found.token_ids == encoder.tokenizer.fast.token_to_id("<|im_end|>")).sum() == 4


def test_offsets_are_exact_though_the_tokenizer_trims_them(tiny: Tiny, tmp_path: Path) -> None:
    folder = _folder(tiny, tmp_path, CHATML)
    value = json.loads((folder / "tokenizer.json").read_text())
    value["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(value))
    assert _scored(folder, CHATS[1])[1] == "  The loud owl <|im_end|> <|im_end|>"


def test_the_real_tokenizers_template_has_a_fingerprint_of_its_own() -> None:
    templates = [ChatTemplate(source, {"bos_token": bos}, (), "x") for source in "ab" for bos in "cd"]
    assert len({template.fingerprint() for template in templates}) == 4
