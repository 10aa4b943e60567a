"""The chat template of a tokenizer: renders a conversation as text, and locates the assistant's characters in it.

The text is that of transformers' `apply_chat_template`, except for today's date, which would change a cache from one
day to the next. Templates that need a date get `DATE`, others use their own default.

The assistant's characters are exact, or the conversation is refused:

- a template with `{% generation %}` blocks marks them itself
- otherwise the turns are located in the rendering (`assistant_turns.py`)
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError

from data.corpus.chat.assistant_turns import MarkedMessage, Span, TurnFinder, make_mark
from data.corpus.chat.conversations import Conversation, Message, content_as_text
from data.corpus.chat.template_program import BLOCK_CLOSE, BLOCK_OPEN, compile_template, json_values, strip_marks
from data.corpus.chat.template_sandbox import join_limited, limited_resources
from data.text_lines import BadRowError
from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, read_json, read_text

MOST_SOURCE = 1 << 20  # characters
RenderSpans = Callable[[Sequence[Message]], tuple[str, list[Span]]]
MAX_RENDER_SECONDS = 10.0  # of processor time for a conversation, of which honest templates take some thousandths


def _with_reasoning(message: Message) -> Message:
    """Returns the message with its reasoning under the names that templates read, as transformers does."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _special_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the special tokens by the names that templates use, such as `bos_token`."""
    tokens: dict[str, Any] = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _named_sources(setting: Any, path: Path) -> dict[str, Any]:
    """Returns templates by name from the `chat_template` of a configuration.

    Raises:
        UsageError: it is a list of named templates without a `default`.
    """
    if not isinstance(setting, list):
        return {} if setting is None else {"default": setting}
    named = {item["name"]: item["template"] for item in cast(list[dict[str, str]], setting)}
    if "default" not in named:
        raise UsageError(f"{path}: has the chat templates {sorted(named)}; wanted one that is named 'default'.")
    return named


class NoTemplateError(UsageError):
    """Error for a teacher without a chat template."""


class ChatTemplate:
    """A template in a sandbox, with the special tokens that it names."""

    def __init__(self, source: str, special: dict[str, Any], turn_ends: Sequence[str], where: str) -> None:
        """Compiles the template.

        Args:
            special: special tokens by the names that the template uses.
            turn_ends: the tokenizer's special tokens, any of which may end a turn.

        Raises:
            UsageError: it is not a template.
        """
        self.source, self.special, self.where = source, special, where
        self.turns = TurnFinder(turn_ends)
        self.for_tools: ChatTemplate | None = None  # another template, for conversations with tools
        self.used_for_tools = False
        if not isinstance(source, str) or len(source) > MOST_SOURCE:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"{where}: the chat template is not text of at most {MOST_SOURCE} characters.")
        try:
            with limited_resources(MAX_RENDER_SECONDS):  # the compiler evaluates constants
                self.template, self.has_generation_blocks = compile_template(source)
        except (TemplateError, RecursionError, MemoryError, SyntaxError, OverflowError, ValueError) as error:
            raise UsageError(f"{where}: not a chat template ({type(error).__name__}: {error!s:.300}).") from None

    @classmethod
    def read(cls, folder: Path, turn_ends: Sequence[str]) -> "ChatTemplate":
        """Reads the template of a Hugging Face folder, from `chat_template.jinja` or `tokenizer_config.json`.

        Raises:
            UsageError: there is none.
        """
        default_file, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        tools_file = folder / "additional_chat_templates" / "tool_use.jinja"
        settings = read_json(path, "the configuration of a tokenizer") if path.exists() else {}
        legacy = folder / "special_tokens_map.json"
        special = _special_tokens(read_json(legacy, "a map of special tokens")) if legacy.exists() else {}
        special |= _special_tokens(settings)
        with damage_as_usage_error(path, "the configuration of a tokenizer"):
            sources = {} if default_file.exists() else _named_sources(settings.get("chat_template"), path)
        if default_file.exists():
            sources["default"] = read_text(default_file, "a chat template")
        if tools_file.exists():
            sources["tool_use"] = read_text(tools_file, "a chat template")
        if "default" not in sources:
            raise NoTemplateError(
                f"{folder}: no chat template, and the corpus has conversations. Wanted chat_template.jinja, or "
                "chat_template in tokenizer_config.json: copy that of the model's instruction-tuned sibling, or "
                "write one."
            )
        where = str(default_file if default_file.exists() else path)
        template = cls(sources["default"], special, turn_ends, where)
        if "tool_use" in sources:
            template.for_tools = cls(
                sources["tool_use"], special, turn_ends, str(tools_file) if tools_file.exists() else where
            )
        return template

    def fingerprint(self) -> str:
        """Returns the sha256 of the template, its special tokens, and the template for tools once that was used."""
        hashed = [self.source, self.special]
        if self.for_tools and self.used_for_tools:
            hashed.append(self.for_tools.source)
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    def _render_marked(self, messages: Sequence[Message], tools: Any, where: str, *, prompt: bool = False) -> str:
        """Renders messages as text, with `OPEN` and `BLOCK_CLOSE` around the output of generation blocks.

        Raises:
            BadRowError: the template refuses them.
        """
        try:
            with limited_resources(MAX_RENDER_SECONDS):
                return join_limited(
                    self.template.generate(
                        messages=list(messages),
                        tools=tools,
                        documents=None,
                        add_generation_prompt=prompt,
                        **self.special,
                    )
                )
        except Exception as error:  # a template is a program and may raise anything
            raise BadRowError(
                f"{where}: the chat template refuses the conversation: {error!s:.300} ({self.where}). Fix the "
                "conversation, or the template.",
                "refused by the chat template",
            ) from None

    @cached_property
    def takes_parts(self) -> bool:
        """Returns True where the template writes the texts of a content of several parts, not a list or nothing."""
        texts: list[str] = []
        for content in ([{"type": "text", "text": BLOCK_OPEN}], BLOCK_OPEN):
            try:
                texts.append(self._render_marked([{"role": "user", "content": content}], None, ""))
            except BadRowError:
                texts.append("")
        parts, text = texts
        return BLOCK_OPEN in parts and (parts == text or BLOCK_OPEN not in text)

    def _prepared(self, message: Message) -> Message:
        """Returns a message as it is passed to the template."""
        message = _with_reasoning(message)
        if isinstance(content := message.get("content"), list) and not self.takes_parts:
            message = {**message, "content": content_as_text(content)}
        return json_values(message, "")

    def render(self, conversation: Conversation, where: str) -> tuple[str, list[Span]]:
        """Renders a conversation. Returns the text, and the characters of the assistant's scored turns.

        Raises:
            BadRowError: the template refuses it, or the assistant's turns cannot be told apart from the rest.
        """
        if conversation.tools and self.for_tools:
            self.used_for_tools = True
            return self.for_tools.render(conversation, where)
        try:
            written = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, default=str)
            messages = [self._prepared(message) for message in conversation.messages]
            tools = json_values(conversation.tools, "tools")
        except RecursionError:
            raise BadRowError(f"{where}: nests too deeply. Drop the row.", "nesting too deep") from None
        if BLOCK_OPEN in written or BLOCK_CLOSE in written:
            raise BadRowError(
                f"{where}: holds U+FDD0 or U+FDD1, which are not characters of text. Drop them.", "no text"
            )

        def render_spans(history: Sequence[Message], prompt: bool = False) -> tuple[str, list[Span]]:
            return strip_marks(self._render_marked(history, tools, where, prompt=prompt))

        # Render the whole conversation, then pick the turns to score.
        whole, spans = render_spans(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        # A weight of 0 leaves a turn out, as in the files of OpenAI's fine-tuning.
        scored = [i for i in turns if i >= conversation.scored_from and messages[i].get("weight") != 0]
        if self.has_generation_blocks:
            for i in scored:
                _check_calls(render_spans, messages, i, whole, f"{where}: messages[{i}]")
            # Drop the blocks of turns that are not scored. Blocks count through the conversation.
            left_out = {block for i in set(turns) - set(scored) for block in _blocks(render_spans, messages, i)}
            return whole, [span for block, span in enumerate(spans) if block not in left_out]
        find_turn = partial(self.turns.find, lambda history, prompt: render_spans(history, prompt)[0], messages)
        return whole, [find_turn(i, whole, f"{where}: messages[{i}]") for i in scored]


def _check_calls(render_spans: RenderSpans, messages: Sequence[Message], number: int, whole: str, where: str) -> None:
    """Checks that the template writes the calls of a message. Its generation block does not show that.

    Raises:
        BadRowError: a call is missing.
    """
    if messages[number].get("tool_calls"):
        turn = MarkedMessage.from_message(messages[number], make_mark(whole))
        turn.check_traces(render_spans([*messages[:number], turn.message, *messages[number + 1 :]])[0], where)


def _blocks(render_spans: RenderSpans, messages: Sequence[Message], number: int) -> range:
    """Returns the indices of the generation blocks of a message, among those of the whole conversation."""
    before = len(render_spans(messages[:number])[1]) if number else 0
    return range(before, len(render_spans(messages[: number + 1])[1]))
