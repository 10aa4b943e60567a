"""The tokenizer's chat template: a conversation as text, and which characters of it are the assistant's.

Rendering is transformers' (`apply_chat_template`), but for the date of today, which would change a cache from one day
to the next: templates that ask for one get `DATE`, others their own default. The assistant's characters are exact, or
the conversation is refused:

- a template with `{% generation %}` blocks says itself what they are;
- otherwise the turns are found in the rendering (`assistant_turns.py`).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError

from data.corpus.chat.assistant_turns import Marked, Span, TurnFinder, mark_of
from data.corpus.chat.conversations import Conversation, Message, content_as_text
from data.corpus.chat.template_program import CLOSE, OPEN, compile_template, plain, without_marks
from data.corpus.chat.template_sandbox import bounded, bounded_text
from data.text_lines import BadRowError
from kd_core.errors import UsageError
from kd_core.files import damaged, read_json, read_text

MOST_SOURCE = 1 << 20  # characters
Write = Callable[[Sequence[Message]], tuple[str, list[Span]]]
SECONDS = 10.0  # of the processor for a conversation; honest templates take some thousandths


def _with_reasoning(message: Message) -> Message:
    """Returns the message with its reasoning under the names that templates read, as transformers gives it to them."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _special_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """`bos_token`, `eos_token` and the like, as templates name them."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _named_sources(found: Any, path: Path) -> dict[str, Any]:
    """Templates by name, of `chat_template` of a configuration: a template, or a list of named ones."""
    if not isinstance(found, list):
        return {} if found is None else {"default": found}
    named = {item["name"]: item["template"] for item in cast(list[dict[str, str]], found)}
    if "default" not in named:
        raise UsageError(f"{path}: has the chat templates {sorted(named)}; wanted one that is named 'default'.")
    return named


class NoTemplateError(UsageError):
    """A teacher without a chat template."""


class ChatTemplate:
    """A template in a sandbox, with the special tokens that it names."""

    def __init__(self, source: str, special: dict[str, Any], turn_ends: Sequence[str], where: str) -> None:
        """Compile; `turn_ends` are the special tokens, which end turns.

        Raises:
            UsageError: it is not a template.
        """
        self.source, self.special, self.where = source, special, where
        self.turns = TurnFinder(turn_ends)
        self.for_tools: ChatTemplate | None = None  # another one, of conversations with tools
        self.used_for_tools = False
        if not isinstance(source, str) or len(source) > MOST_SOURCE:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"{where}: the chat template is no text of at most {MOST_SOURCE} characters.")
        try:
            with bounded(SECONDS):  # constants are worked out here
                self.template, self.has_generation_blocks = compile_template(source)
        except (TemplateError, RecursionError, MemoryError, SyntaxError, OverflowError, ValueError) as error:
            raise UsageError(f"{where}: not a chat template ({type(error).__name__}: {error!s:.300}).") from None

    @classmethod
    def read(cls, folder: Path, turn_ends: Sequence[str]) -> "ChatTemplate":
        """Returns the template of a Hugging Face folder: `chat_template.jinja`, or that of `tokenizer_config.json`.

        Raises:
            UsageError: there is none.
        """
        own, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        beside = folder / "additional_chat_templates" / "tool_use.jinja"
        settings = read_json(path, "the configuration of a tokenizer") if path.exists() else {}
        legacy = folder / "special_tokens_map.json"
        special = _special_tokens(read_json(legacy, "a map of special tokens")) if legacy.exists() else {}
        special |= _special_tokens(settings)
        with damaged(path, "the configuration of a tokenizer"):
            sources = {} if own.exists() else _named_sources(settings.get("chat_template"), path)
        if own.exists():
            sources["default"] = read_text(own, "a chat template")
        if beside.exists():
            sources["tool_use"] = read_text(beside, "a chat template")
        if "default" not in sources:
            raise NoTemplateError(
                f"{folder}: no chat template, and the corpus has conversations. Wanted chat_template.jinja, or "
                "chat_template in tokenizer_config.json: copy that of the model's instruction-tuned sibling, or "
                "write one."
            )
        where = str(own if own.exists() else path)
        found = cls(sources["default"], special, turn_ends, where)
        if "tool_use" in sources:
            found.for_tools = cls(sources["tool_use"], special, turn_ends, str(beside) if beside.exists() else where)
        return found

    def fingerprint(self) -> str:
        """Returns a sha256 over the template, its special tokens, and the template of tools once that was used."""
        known = [self.source, self.special]
        if self.for_tools and self.used_for_tools:
            known.append(self.for_tools.source)
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def _marked(self, messages: Sequence[Message], tools: Any, where: str, *, prompt: bool = False) -> str:
        try:
            with bounded(SECONDS):
                return bounded_text(
                    self.template.generate(
                        messages=list(messages),
                        tools=tools,
                        documents=None,
                        add_generation_prompt=prompt,
                        **self.special,
                    )
                )
        except Exception as error:  # a template is a program: it fails as it likes
            raise BadRowError(
                f"{where}: the chat template refuses the conversation: {error!s:.300} ({self.where}). Mend the "
                "conversation, or the template.",
                "refused by the chat template",
            ) from None

    @cached_property
    def takes_parts(self) -> bool:
        """Checks that a content of several parts is written as their texts are, and not as a list, or not at all."""
        texts: list[str] = []
        for content in ([{"type": "text", "text": OPEN}], OPEN):
            try:
                texts.append(self._marked([{"role": "user", "content": content}], None, ""))
            except BadRowError:
                texts.append("")
        parts, text = texts
        return OPEN in parts and (parts == text or OPEN not in text)

    def _prepared(self, message: Message) -> Message:
        """Returns a message as the template sees it."""
        message = _with_reasoning(message)
        if isinstance(content := message.get("content"), list) and not self.takes_parts:
            message = {**message, "content": content_as_text(content)}
        return plain(message, "")

    def render(self, conversation: Conversation, where: str) -> tuple[str, list[Span]]:
        """Returns the conversation as text, and the characters that the assistant's scored turns are.

        Raises:
            BadRowError: the template refuses it, or the assistant's turns cannot be told from the rest.
        """
        if conversation.tools and self.for_tools:
            self.used_for_tools = True
            return self.for_tools.render(conversation, where)
        try:
            written = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, default=str)
            messages = [self._prepared(message) for message in conversation.messages]
            tools = plain(conversation.tools, "tools")
        except RecursionError:
            raise BadRowError(f"{where}: nests too deeply. Drop the row.", "nesting too deep") from None
        if OPEN in written or CLOSE in written:
            raise BadRowError(
                f"{where}: holds U+FDD0 or U+FDD1, which are no characters of any text. Drop them.", "no text"
            )

        def write(these: Sequence[Message], prompt: bool = False) -> tuple[str, list[Span]]:
            return without_marks(self._marked(these, tools, where, prompt=prompt))

        whole, spans = write(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        # A weight of 0 leaves a turn out, as in the files of OpenAI's fine-tuning.
        scored = [i for i in turns if i >= conversation.scored_from and messages[i].get("weight") != 0]
        if self.has_generation_blocks:
            for i in scored:
                _check_calls(write, messages, i, whole, f"{where}: messages[{i}]")
            left_out = {block for i in set(turns) - set(scored) for block in _blocks(write, messages, i)}
            return whole, [span for block, span in enumerate(spans) if block not in left_out]
        finds = partial(self.turns.find, lambda these, prompt: write(these, prompt)[0], messages)
        return whole, [finds(i, whole, f"{where}: messages[{i}]") for i in scored]


def _check_calls(write: Write, messages: Sequence[Message], number: int, whole: str, where: str) -> None:
    """Checks that the calls of a message are written, which its generation block does not say."""
    if messages[number].get("tool_calls"):
        turn = Marked.from_message(messages[number], mark_of(whole))
        turn.check_traces(write([*messages[:number], turn.message, *messages[number + 1 :]])[0], where)


def _blocks(write: Write, messages: Sequence[Message], number: int) -> range:
    """Returns the numbers of the generation blocks that a message has, counted over the conversation."""
    before = len(write(messages[:number])[1]) if number else 0
    return range(before, len(write(messages[: number + 1])[1]))
