"""What a corpus is made of: a document, and how a row of a file becomes one."""

import hashlib
import json
from typing import Any, NamedTuple

from data.export.chat import Conversation, completed_prompt, conversation
from data.export.rows import Row
from kd_core.errors import UsageError

CONTENTS = ("auto", "text", "messages", "completion")


class Document(NamedTuple):
    """A name that stays the same between exports, what is in it (text, or a conversation), and where it lies."""

    name: str
    content: str | Conversation
    where: str = ""

    def digest(self) -> bytes:
        """Returns 16 bytes by which documents of the same content are known, whatever they are called."""
        known = self.content
        if isinstance(known, Conversation) and known.tools is None:
            known = known[:2]  # as before there were tools
        written = json.dumps(known, sort_keys=True, default=str)
        return hashlib.sha256(written.encode()).digest()[:16]


def _keys(content: str, text_field: str) -> tuple[str, ...]:
    return {"text": (text_field,), "messages": ("messages",), "completion": ("prompt", "completion")}[content]


def wanted_keys(text_field: str) -> set[str]:
    """Every key of a row that a document can be made of."""
    return {key for content in CONTENTS[1:] for key in _keys(content, text_field)} | {"tools"}


def _content_of(row: Row, fields: dict[str, Any], text_field: str) -> str:
    """Which of `CONTENTS` the row holds, where the corpus does not say: exactly one, never a guess."""
    kinds = {kind: _keys(kind, text_field) for kind in CONTENTS[1:]}
    found = [kind for kind, keys in kinds.items() if all(key in fields for key in keys)]
    if len(found) == 1:
        return found[0]
    if found:
        shown = " and ".join(repr(key) for kind in found for key in kinds[kind])
        raise UsageError(f"{row.where}: has {shown}; wanted one of them. Set corpus.content={' or '.join(found)}.")
    raise UsageError(
        f"{row.where}: no field {text_field!r} (corpus.text_field), 'messages', or 'prompt' and 'completion'. "
        f"It has {', '.join(sorted(map(repr, fields))) or 'none'}."
    )


def _text(row: Row, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{row.where}: {field!r} is a {type(value).__name__}, wanted text.")
    return value


def document_of(row: Row, content: str, text_field: str) -> Document:
    """The document of a row; `content` is one of `CONTENTS`.

    Raises:
        UsageError: the row holds nothing that `content` names, or something of another type.
    """
    if isinstance(row.value, str):
        return Document(row.name, row.value, row.where)
    fields = row.value
    kind = _content_of(row, fields, text_field) if content == "auto" else content
    missing = [key for key in _keys(kind, text_field) if key not in fields]
    if missing:
        raise UsageError(
            f"{row.where}: no field {missing[0]!r}; wanted it for corpus.content={content}. "
            f"The row has {', '.join(sorted(map(repr, fields))) or 'no field'}."
        )
    if kind == "text":
        return Document(row.name, _text(row, text_field, fields[text_field]), row.where)
    tools = fields.get("tools")
    if kind == "messages":
        return Document(row.name, conversation(fields["messages"], row.where, tools=tools), row.where)
    completed = completed_prompt(fields["prompt"], fields["completion"], row.where, tools)
    return Document(row.name, completed, row.where)
