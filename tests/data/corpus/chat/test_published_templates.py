"""Conversations in chat templates as they are published: ids and masks are those of transformers.

Templates are those of the models' tokenizers, as the package trl 1.16 (`trl/chat_templates`) and public repositories
that quote them have them. The masks of transformers need generation blocks, which `BLOCKS` puts in by hand.
"""

import random
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from data.corpus.chat.conversations import Message, parse_conversation
from data.corpus.documents import Document
from data.corpus.encoding import Encoder
from data.text_lines import BadRowError
from tests.tiny import Tiny, make_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI = ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
# What begins a text, what ends it, and the special tokens.
TOKENS = {
    "qwen2.5": ("", "<|im_end|>", IM),
    "qwen3": ("", "<|im_end|>", IM),
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>", LLAMA),
    "llama-3.1": ("<|begin_of_text|>", "<|eot_id|>", LLAMA),
    "llama-3.2": ("<|begin_of_text|>", "<|eot_id|>", LLAMA),
    "phi-3.5": ("<s>", "<|endoftext|>", PHI),
    "smollm2": ("<|im_start|>", "<|im_end|>", IM),
    "smollm3": ("", "<|im_end|>", IM),
    "gemma-2": ("<bos>", "<eos>", GEMMA),
    "gemma-3": ("<bos>", "<eos>", GEMMA),
    "mistral-7b-v0.3": ("<s>", "</s>", MISTRAL),
}
ON, OFF = "{% generation %}", "{% endgeneration %}"
HEADER = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
LLAMA_TEXT = (
    f"{{{{- {HEADER}+ message['content'] | trim + '<|eot_id|>' }}}}",
    f"{{{{- {HEADER} }}}}{{% if message.role == 'assistant' %}}{ON}{{{{- message['content'] | trim + '<|eot_id|>' }}}}"
    f"{OFF}{{% else %}}{{{{- message['content'] | trim + '<|eot_id|>' }}}}{{% endif %}}",
)
LLAMA_CALL = ('{{- \'{"name": "\' + tool_call.name', f'{ON}{{{{- \'{{"name": "\' + tool_call.name')
# Of each family: texts of the template, and what they become.
BLOCKS: dict[str, list[tuple[str, str]]] = {
    "qwen2.5": [
        (' or (message.role == "assistant" and not message.tool_calls)', ""),
        (
            "{{- '<|im_start|>' + message.role }}\n        {%- if message.content %}\n"
            "            {{- '\\n' + message.content }}\n        {%- endif %}",
            "{{- '<|im_start|>assistant\\n' }}" + ON + "{{- message.content }}",
        ),
        (
            "{{- '\\n<tool_call>\\n{\"name\": \"' }}",
            "{%- if message.content or not loop.first %}{{- '\\n' }}{% endif %}{{- '<tool_call>\\n{\"name\": \"' }}",
        ),
        (
            "        {%- endfor %}\n        {{- '<|im_end|>\\n' }}",
            "        {%- endfor %}{{- '<|im_end|>' }}" + OFF + "{{- '\\n' }}",
        ),
    ],
    "qwen3": [
        ("{%- if loop.index0 > ns.last", "{{- '<|im_start|>assistant\\n' }}" + ON + "{%- if loop.index0 > ns.last"),
        ("{{- '<|im_start|>' + message.role + '\\n<think>", "{{- '<think>"),
        ("{{- '<|im_start|>' + message.role + '\\n' + content }}", "{{- content }}"),
        (
            "        {%- endif %}\n        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}",
            "        {%- endif %}{{- '<|im_end|>' }}" + OFF + "{{- '\\n' }}{%- elif message.role == \"tool\" %}",
        ),
    ],
    "llama-3": [
        (
            "{{ content }}",
            "{% if message['role'] == 'assistant' %}{% set said = message['content'] | trim + '<|eot_id|>' %}"
            "{{ content[:content | length - said | length] }}" + ON + "{{ said }}" + OFF + "{% else %}{{ content }}"
            "{% endif %}",
        )
    ],
    "llama-3.1": [
        LLAMA_TEXT,
        LLAMA_CALL,
        ('{{- "}" }}\n', '{{- "}" }}' + OFF + "\n"),
        ('{%- else %}\n            {{- "<|eot_id|>" }}', "{%- else %}" + ON + '{{- "<|eot_id|>" }}' + OFF),
    ],
    "llama-3.2": [LLAMA_TEXT, LLAMA_CALL, ('{{- "}" }}\n        {{- "<|eot_id|>" }}', '{{- "}<|eot_id|>" }}' + OFF)],
    "phi-3.5": [
        (
            "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
            "{{'<|assistant|>\n'}}" + ON + "{{ message['content'] + '<|end|>' }}" + OFF + "{{'\n'}}",
        )
    ],
    "smollm2": [
        (
            "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
            "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}" + ON + ""
            "{{ message['content'] + '<|im_end|>' }}" + OFF + "{% else %}{{ message['content'] + '<|im_end|>' }}"
            "{% endif %}{{'\n'}}",
        )
    ],
    "smollm3": [],
    "gemma-2": [
        (
            "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
            "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}" + ON + "{{ message['content'] | trim + "
            "'<end_of_turn>' }}" + OFF + "{% else %}{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}"
            "{{ '\n' }}",
        )
    ],
    "gemma-3": [
        (
            "    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n    {%- elif",
            "    {%- if role == 'model' -%}" + ON + "{%- if message['content'] is string -%}"
            "{{ message['content'] | trim }}"
            "{%- else -%}{%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}{%- endif -%}"
            "{{ '<end_of_turn>' }}" + OFF + "{{ '\n' }}{%- elif message['content'] is string -%}"
            "{{ message['content'] | trim }}{%- elif",
        ),
        ("    {{ '<end_of_turn>\n' }}", "{%- if role != 'model' -%}{{ '<end_of_turn>\n' }}{%- endif -%}"),
    ],
    "mistral-7b-v0.3": [
        ('{{- "[TOOL_CALLS] [" }}', ON + '{{- "[TOOL_CALLS] [" }}'),
        (
            '        {%- endfor %}\n    {%- elif message["role"] == "assistant" %}',
            "        {%- endfor %}" + OFF + '{%- elif message["role"] == "assistant" %}',
        ),
        ('{{- " " + message["content"]|trim', ON + '{{- " " + message["content"]|trim'),
        ("|trim + eos_token}}", "|trim + eos_token}}" + OFF),
    ],
}  # fmt: skip
# Templates that write what an assistant calls.
WRITE_CALLS = {"qwen2.5", "qwen3", "llama-3.1", "llama-3.2", "mistral-7b-v0.3"}
WORDS = (
    *("owl", "naïve", "東京", "🦉🐔", "e\u0301", "שלום", "<b>a & b</b>", '"quoted"', "a\n\nb", "\tx ", "I'm"),
    *("{{ x }}", "\\n", "1790–2024", "assistant", "user\n", "<think>", "ab" * 40),
    *("<|im_end|>\n<|im_start|>assistant\n", "<|end|>\n<|assistant|>\n", "[/INST]", "</s>"),
    *("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<end_of_turn>\n<start_of_turn>model\n"),
)


# How many of the 200 conversations transformers takes with something to score, and the calls are written.
TAKEN = dict.fromkeys(("llama-3", "phi-3.5", "smollm2", "smollm3"), 144) | {
    "qwen2.5": 200,
    "qwen3": 200,
    "llama-3.1": 171,
    "llama-3.2": 171,
    "gemma-2": 87,
    "gemma-3": 131,
    "mistral-7b-v0.3": 186,
}


class Chat(NamedTuple):
    """A row of a corpus: messages, and perhaps tools."""

    messages: list[Message]
    tools: list[Any] | None


def _say(draw: random.Random) -> str:
    text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6)))
    return draw.choice(("", "", "\n", "  ")) + text + draw.choice(("", "", "\n", " \n\n"))


def _answer(draw: random.Random, reasons: str) -> Message:
    said = _say(draw).replace("<think>", "hm")
    if reasons == "content":
        return {"role": "assistant", "content": f"<think>\n{_say(draw).replace('<think>', '')}\n</think>\n\n{said}"}
    field = {"reasoning_content": _say(draw)} if reasons == "field" and draw.random() < 0.7 else {}
    return {"role": "assistant", "content": said, **field}


def _call(draw: random.Random, number: int) -> Message:
    arguments = draw.choice(({"city": "Zürich"}, {"days": 3, "units": ["C", "F"]}, {}))
    function = {"name": draw.choice(("look", "listen")), "arguments": arguments}
    return {"type": "function", "id": f"call0000{number}", "function": function}


def _asks_tools(draw: random.Random, reasons: str) -> list[Message]:
    calls = [_call(draw, i) for i in range(draw.choice((1, 1, 2)))]
    asked = {**_answer(draw, reasons), "tool_calls": calls}
    if draw.random() < 0.6:
        asked["content"] = None
    results = [{"role": "tool", "tool_call_id": call["id"], "content": _say(draw)} for call in calls]
    return [asked, *results]


def _chat(number: int) -> Chat:
    draw = random.Random(number)
    reasons = draw.choice(("", "", "content", "field"))
    tools = draw.random() < 0.3
    messages: list[Message] = []
    if draw.random() < 0.4:
        messages.append({"role": "system", "content": _say(draw)})
    if draw.random() < 0.15:
        messages.append(_answer(draw, ""))
    for _ in range(draw.choice((1, 1, 2, 3, 5))):
        messages.append({"role": "user", "content": _say(draw)})
        if tools and draw.random() < 0.7:
            messages += _asks_tools(draw, reasons)
        messages.append(_answer(draw, reasons))
    if draw.random() < 0.1:
        messages.append({"role": "user", "content": _say(draw)})
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    schema = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": parameters}}
    return Chat(messages, [schema] if tools and draw.random() < 0.8 else None)


CHATS = [_chat(number) for number in range(200)]


def _theirs(folder: Path, family: str, blocks: bool) -> PreTrainedTokenizerFast:
    bos, eos, _ = TOKENS[family]
    template = (TEMPLATES / f"{family}.jinja").read_text()
    for old, new in BLOCKS[family] if blocks else []:
        assert template.count(old) == 1 or family == "qwen3", old
        template = template.replace(old, new)
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, bos_token=bos or None, eos_token=eos, chat_template=template)


class _Then(datetime):
    """A clock of transformers' that stands at the date that our templates get."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # noqa: ARG003
        return datetime(2024, 7, 26)


def _folder(tiny: Tiny, path: Path, family: str) -> Path:
    """A tokenizer with a family's special tokens and published template."""
    tokenizer = make_tokenizer(path, [file.read_text() for file in sorted(tiny.corpus.iterdir())])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in TOKENS[family][2]])
    tokenizer.save(str(path / "tokenizer.json"))
    _theirs(path, family, blocks=False).save_pretrained(path)
    return path


def _writes_no_call(family: str, chat: Chat) -> bool:
    """Checks that transformers renders a conversation of which a student would learn to say nothing."""
    calls = any("tool_calls" in message for message in chat.messages)
    # With tools, Llama 3.1 takes the first message behind the system's for the user's, whosever it is.
    first = next(message for message in chat.messages if message["role"] != "system")
    misplaced = chat.tools and family.startswith("llama-3.") and first["role"] == "assistant"
    return bool(misplaced) or (calls and family not in WRITE_CALLS)


@pytest.mark.parametrize("family", TOKENS)
def test_ids_and_masks_are_those_of_transformers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", _Then)
    encoder = Encoder(_folder(tiny, tmp_path, family))
    published, marked = (_theirs(tmp_path, family, blocks) for blocks in (False, True))
    taken = 0
    for number, chat in enumerate(CHATS):
        document = Document(f"{number}", parse_conversation(chat.messages, "", tools=chat.tools))
        try:
            ids = published.apply_chat_template(chat.messages, tools=chat.tools)["input_ids"]
        except Exception:  # as the template likes to fail
            ids = None
        if ids is None or _writes_no_call(family, chat):
            with pytest.raises(BadRowError):
                next(encoder.encode([document]))
            continue
        theirs = marked.apply_chat_template(
            chat.messages, tools=chat.tools, return_assistant_tokens_mask=True, return_dict=True
        )
        assert theirs["input_ids"] == ids  # the blocks change nothing
        [ours] = encoder.encode([document])
        assert ours.token_ids.tolist() == ids
        assert ours.loss_mask.tolist() == theirs["assistant_masks"][1:], number
        taken += sum(theirs["assistant_masks"]) > 0
    assert taken >= TAKEN[family]
