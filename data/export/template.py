"""The tokenizer's chat template: a conversation as text, and which characters of it are the assistant's.

Rendering is transformers' (`apply_chat_template`), but for the date of today, which no template gets: it would change
a cache from one day to the next. The assistant's characters are exact, or the conversation is refused:

- a template with `{% generation %}` blocks says itself what they are;
- otherwise each turn of the assistant is what the template writes between its prompt for generation and the turn's
  end, `render(messages[:i], prompt)` to `render(messages[:i + 1])`, and each must be the beginning of the next.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Macro

from data.export.bounded_template import BoundedEnvironment, bounded, bounded_text
from data.export.chat import Conversation, Message
from kd_core.errors import UsageError
from kd_core.files import damaged, read_json, read_text

# Around what a generation block writes; Unicode keeps them for a program's own use, no text has them.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
Span = tuple[int, int]
MOST_SOURCE = 1 << 20  # characters
SECONDS = 10.0  # of the processor for a conversation; honest templates take some thousandths


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: its text between `OPEN` and `CLOSE`."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """A call of `_mark` with the block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """As transformers has it: jinja2's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _without_marks(text: str) -> tuple[str, list[Span]]:
    """The text without marks, and the spans that they stood around."""
    parts: list[str] = []
    spans: list[Span] = []
    at = begun = 0
    for piece in text.replace(CLOSE, OPEN + CLOSE).split(OPEN):
        if piece.startswith(CLOSE):
            spans.append((begun, at))
        begun = at
        parts.append(piece.removeprefix(CLOSE))
        at += len(parts[-1])
    return "".join(parts), spans


def _special_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """`bos_token`, `eos_token` and the like, as templates name them."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _named_source(found: Any, path: Path) -> str | None:
    """`chat_template` of a configuration: a template, or a list of named ones."""
    if isinstance(found, list):
        named = {item["name"]: item["template"] for item in cast(list[dict[str, str]], found)}
        if "default" not in named:
            raise UsageError(f"{path}: has the chat templates {sorted(named)}; wanted one that is named 'default'.")
        return named["default"]
    return found


class NoTemplateError(UsageError):
    """A teacher without a chat template."""


class ChatTemplate:
    """A template in a sandbox, with the special tokens that it names."""

    def __init__(self, source: str, special: dict[str, Any], turn_ends: Sequence[str], where: str) -> None:
        """Compile; `turn_ends` are special tokens, behind which white space is no part of a turn.

        Raises:
            UsageError: it is not a template.
        """
        self.source, self.special, self.where = source, special, where
        self.turn_ends = tuple(turn_ends)
        if not isinstance(source, str) or len(source) > MOST_SOURCE:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"{where}: the chat template is no text of at most {MOST_SOURCE} characters.")
        environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls])
        environment.filters["tojson"] = _to_json
        cast(dict[str, Any], environment.globals)["raise_exception"] = _raise_exception
        try:
            with bounded(SECONDS):  # constants are worked out here
                tree = environment.parse(source)
                self.template = environment.from_string(source)
        except (TemplateError, RecursionError, MemoryError, SyntaxError, OverflowError, ValueError) as error:
            raise UsageError(f"{where}: not a chat template ({type(error).__name__}: {error!s:.300}).") from None
        self.has_generation_blocks = any(
            isinstance(call.node, nodes.ExtensionAttribute) for call in tree.find_all(nodes.Call)
        )

    @classmethod
    def read(cls, folder: Path, turn_ends: Sequence[str]) -> "ChatTemplate":
        """The template of a Hugging Face folder: `chat_template.jinja`, or that of `tokenizer_config.json`.

        Raises:
            UsageError: there is none.
        """
        own, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        settings = read_json(path, "the configuration of a tokenizer") if path.exists() else {}
        legacy = folder / "special_tokens_map.json"
        special = _special_tokens(read_json(legacy, "a map of special tokens")) if legacy.exists() else {}
        special |= _special_tokens(settings)
        if own.exists():
            return cls(read_text(own, "a chat template"), special, turn_ends, str(own))
        with damaged(path, "the configuration of a tokenizer"):
            source = _named_source(settings.get("chat_template"), path)
        if source is None:
            raise NoTemplateError(
                f"{folder}: no chat template, and the corpus has conversations. Wanted chat_template.jinja, or "
                "chat_template in tokenizer_config.json: copy that of the model's instruction-tuned sibling, or "
                "write one."
            )
        return cls(source, special, turn_ends, str(path))

    def fingerprint(self) -> str:
        """sha256 over the template and its special tokens."""
        return hashlib.sha256(json.dumps([self.source, self.special], sort_keys=True).encode()).hexdigest()

    def _marked(self, messages: Sequence[Message], document: str, *, prompt: bool = False) -> str:
        try:
            with bounded(SECONDS):
                return bounded_text(
                    self.template.generate(
                        messages=list(messages),
                        tools=None,
                        documents=None,
                        add_generation_prompt=prompt,
                        **self.special,
                    )
                )
        except Exception as error:  # a template is a program: it fails as it likes
            raise UsageError(
                f"{document}: the chat template refuses the conversation: {error!s:.300} ({self.where}). Mend the "
                "conversation, or the template."
            ) from None

    def _text(self, messages: Sequence[Message], document: str, *, prompt: bool = False) -> str:
        return _without_marks(self._marked(messages, document, prompt=prompt))[0]

    def _turn_end(self, text: str, start: int) -> int:
        """Where the turn that ends `text` ends: white space behind a special token is the template's, no answer."""
        bare = text.rstrip()
        return len(bare) if len(bare) > start and bare.endswith(self.turn_ends) else len(text)

    def _turns(self, conversation: Conversation, full: str, document: str) -> list[Span]:
        spans: list[Span] = []
        for i, message in enumerate(conversation.messages):
            if message["role"] != "assistant" or i < conversation.scored_from:
                continue
            before = self._text(conversation.messages[:i], document, prompt=True)
            after = self._text(conversation.messages[: i + 1], document)
            if not (full.startswith(after) and after.startswith(before)):
                raise UsageError(
                    f"{document}: messages[{i}]: the chat template ({self.where}) writes this turn another way once "
                    "more messages follow, or does not begin it with its generation prompt, so what the assistant "
                    "said cannot be told from the rest. Put {% generation %} … {% endgeneration %} around the "
                    "assistant's text in the template, or give the turn a row of its own (prompt and completion)."
                )
            spans.append((len(before), self._turn_end(after, len(before))))
        return spans

    def render(self, conversation: Conversation, document: str) -> tuple[str, list[Span]]:
        """The conversation as text, and the characters that the assistant's scored turns are.

        Raises:
            UsageError: the template refuses it, or the assistant's turns cannot be told from the rest.
        """
        with damaged(document, "a conversation", "Drop it"):
            written = json.dumps(conversation.messages, ensure_ascii=False)
        if OPEN in written or CLOSE in written:
            raise UsageError(f"{document}: holds U+FDD0 or U+FDD1, which are no characters of any text. Drop them.")
        text, spans = _without_marks(self._marked(conversation.messages, document))
        if not self.has_generation_blocks:
            return text, self._turns(conversation, text, document)
        prompt = conversation.messages[: conversation.scored_from]
        of_prompt = _without_marks(self._marked(prompt, document))[1] if prompt else []
        return text, spans[len(of_prompt) :]
