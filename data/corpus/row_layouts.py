"""Layouts of rows: which fields data sets keep their texts and conversations in, and what each is read as.

| layout | fields | as in |
|---|---|---|
| text | `text` (or `corpus.text_field`) | plain text |
| messages | `messages`, of role and content | OpenAI, TRL |
| conversations | `conversations`, of from and value (or role and content) | ShareGPT, OpenHermes |
| completion | `prompt` and `completion` | TRL |
| instruction | `instruction`, `input` or `context`, `output` or `response`, `history` | Alpaca, Dolly |
| question | `question` and `response` | OpenOrca |

A `system` or `system_prompt` beside any of them but `text` is the system message, where there is none. Fields of other
names are given by `corpus.fields`.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

from data.corpus.chat.conversations import (
    ROLES,
    Conversation,
    Message,
    PlainPrompt,
    completed_prompt,
    conversation,
    text_of,
    tools_of,
)
from data.corpus.layout_hints import setting, setting_hint
from data.text_lines import BadRowError

Fields = Mapping[str, Any]
# Of each layout its fields; any one of those that stand together serves.
LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("text",),),
    "messages": (("messages",),),
    "conversations": (("conversations", "conversation"),),
    "completion": (("prompt",), ("completion",)),
    "instruction": (("instruction",), ("output", "response")),
    "question": (("question",), ("response",)),
}
FURTHER = ("system", "system_prompt", "input", "context", "history", "tools")
CALL = "function_call"
ROLE_NAMES = {
    **{role: role for role in (*ROLES, CALL)},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "function", "ipython"), "tool"),
}
MAPPED = ("text", "messages", "role", "content", "prompt", "completion", "system")


class Reading(NamedTuple):
    """Settings of a corpus by which rows are read. `content` is a layout or `auto`."""

    content: str = "auto"
    text_field: str = "text"
    fields: Mapping[str, str] | None = None

    def layouts(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """`LAYOUTS` with the name of the text's field."""
        return {**LAYOUTS, "text": ((self.text_field,),)}


def check_fields(fields: Mapping[str, str]) -> None:
    """Refuse a mapping that names no document.

    Raises:
        ValueError: says what was wanted.
    """
    unknown = sorted(set(fields) - set(MAPPED))
    kinds = [kind for kind in ("text", "messages", "prompt") if kind in fields]
    if unknown or len(kinds) != 1 or ("prompt" in fields) != ("completion" in fields):
        raise ValueError(
            "wanted a field of the rows for 'text', for 'messages' (with 'role' and 'content' where its items call "
            "them otherwise), or for both 'prompt' and 'completion' (with 'system')"
        )


def present_layouts(names: Collection[str], reading: Reading) -> list[str]:
    """The layouts whose fields are all there."""
    return [
        layout
        for layout, sides in reading.layouts().items()
        if all(any(name in names for name in side) for side in sides)
    ]


def columns_to_read(columns: Collection[str], reading: Reading) -> list[str]:
    """Returns the columns that a document can be made of, or all where there are none, for a message to name."""
    if reading.fields:
        wanted = {*reading.fields.values(), "tools"}
    else:
        wanted = {name for sides in reading.layouts().values() for side in sides for name in side} | set(FURTHER)
        wanted = wanted if present_layouts(columns, reading) else set(columns)
    return [name for name in columns if name in wanted] or list(columns)


def _one_of(fields: Fields, names: tuple[str, ...], where: str) -> str | None:
    """Returns the one of several names that is there."""
    found = [name for name in names if name in fields]
    if len(found) > 1:
        message = (
            f"{where}: has both {found[0]!r} and {found[1]!r}; wanted one of them. Name the fields that count: "
            f"{setting(fields={'prompt': 'FIELD', 'completion': 'FIELD'})}."
        )
        raise BadRowError(message, "several readings")
    return found[0] if found else None


def _text(fields: Fields, field: str, where: str) -> str:
    value = fields[field]
    if not isinstance(value, str):
        message = f"{where}: {field!r} is a {type(value).__name__}, wanted text."
        raise BadRowError(message, "a field of another type")
    return value


def _calls(value: Any, where: str) -> Message:
    """A function call of ShareGPT, which is JSON, as a message."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        calls = cast(list[Any], found if isinstance(found, list) else [found])
        named = [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
    except (ValueError, TypeError, KeyError, RecursionError):
        message = f"{where}: a function call that is not JSON with 'name' and 'arguments' ({value!a:.80}). Mend it."
        raise BadRowError(message, "a function call that is not JSON") from None
    return {"role": "assistant", "tool_calls": named}


def _message(value: Any, where: str, role_field: str, content_field: str) -> Any:
    """A turn with role and content under our names; what is no such turn stays as it is, to be refused by name."""
    if not isinstance(value, dict):
        return value
    turn = cast(dict[str, Any], value)
    if role_field not in turn and "from" in turn:
        role_field, content_field = "from", "value"
    role, content = turn.get(role_field), turn.get(content_field)
    usual = ROLE_NAMES.get(role.lower()) if isinstance(role, str) else None
    if usual in (None, role) and (role_field, content_field) == ("role", "content"):
        return turn
    rest = {key: item for key, item in turn.items() if key not in (role_field, content_field)}
    if usual == CALL:
        return {**rest, **_calls(content, where)}
    named = {"role": usual or role, "content": content}
    return {**rest, **{key: item for key, item in named.items() if item is not None}}


def _messages(value: Any, where: str, field: str, names: tuple[str, str] = ("role", "content")) -> list[Message]:
    """A field's messages; a list may also be written as JSON, as in CSV."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRowError(f"{where}: {field!r} is text, but no JSON of a list. Mend it.", "not JSON") from None
    if isinstance(value, list):
        turns = enumerate(cast(list[Any], value))
        value = [_message(turn, f"{where}: {field}[{i}]", *names) for i, turn in turns]
    return conversation(value, where, field).messages


def _side(value: Any, where: str, field: str) -> Any:
    return _messages(value, where, field) if isinstance(value, list) else value


def _with_system(made: Conversation, fields: Fields, field: str | None, where: str) -> Conversation:
    """The conversation after its system message, where a field has one and the conversation none."""
    if field is None or made.messages[0]["role"] in ("system", "developer") or not _text(fields, field, where).strip():
        return made
    system = {"role": "system", "content": fields[field]}
    return Conversation(*made)._replace(
        messages=[system, *made.messages], scored_from=made.scored_from + bool(made.scored_from)
    )


def _instruction(fields: Fields, where: str) -> list[Message]:
    """Alpaca's and Dolly's: what the instruction is about stands behind it, after a blank line."""
    about, answer = _one_of(fields, ("input", "context"), where), _one_of(fields, ("output", "response"), where)
    parts = [_text(fields, name, where) for name in ("instruction", about) if name]
    said = [*cast(list[Any], fields.get("history", [])), ["\n\n".join(part for part in parts if part.strip()), None]]
    said[-1][1] = _text(fields, answer, where) if answer else ""
    if not all(isinstance(pair, list) and len(cast(list[Any], pair)) == 2 for pair in said):
        raise BadRowError(f"{where}: 'history' is no list of pairs. Mend it.", "a field of another type")
    return [
        {"role": role, "content": text} for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _content(layout: str, fields: Fields, reading: Reading, where: str) -> str | Conversation:
    """Returns the text or conversation of a row of a known layout."""
    if layout == "text":
        return _text(fields, reading.text_field, where)
    system = next((name for name in ("system", "system_prompt") if name in fields), None)
    if layout == "completion":
        return _with_system(_completed(fields["prompt"], fields["completion"], where), fields, system, where)
    if layout == "instruction":
        messages = _instruction(fields, where)
    elif layout == "question":
        sides = (("user", "question"), ("assistant", "response"))
        messages = [{"role": role, "content": _text(fields, name, where)} for role, name in sides]
    else:
        field = next(name for name in LAYOUTS[layout][0] if name in fields)
        messages = _messages(fields[field], where, field)
    return _with_system(conversation(messages, where, layout), fields, system, where)


def _completed(prompt: Any, completion: Any, where: str) -> Conversation:
    made = completed_prompt(_side(prompt, where, "prompt"), _side(completion, where, "completion"), where)
    plain = isinstance(prompt, str) and isinstance(completion, str)
    return PlainPrompt(*made) if plain else made


def _mapped(mapping: Mapping[str, str], fields: Fields, where: str) -> str | Conversation:
    """Returns the text or conversation in the fields that `corpus.fields` names."""
    needed = [name for name in ("text", "messages", "prompt", "completion") if name in mapping]
    _refuse_missing([mapping[name] for name in needed], fields, where, f"corpus.fields={dict(mapping)}")
    if "text" in mapping:
        return _text(fields, mapping["text"], where)
    if "messages" in mapping:
        names = mapping.get("role", "role"), mapping.get("content", "content")
        field = mapping["messages"]
        made = Conversation(_messages(fields[field], where, field, names))
    else:
        made = _completed(fields[mapping["prompt"]], fields[mapping["completion"]], where)
    system = mapping.get("system")
    return _with_system(made, fields, system if system in fields else None, where)


def _refuse_missing(names: Collection[str], fields: Fields, where: str, setting: str) -> None:
    missing = [name for name in names if name not in fields]
    if missing:
        has = ", ".join(sorted(map(repr, fields))) or "no field"
        message = f"{where}: no field {missing[0]!r}; wanted it for {setting}. The row has {has}."
        raise BadRowError(message, "a field is missing")


def _is_rendering(text: Any, content: str | Conversation) -> bool:
    """Returns True where a text holds all that a conversation says: it is the same, through somebody's template."""
    if not isinstance(text, str) or isinstance(content, str):
        return False
    said = [text_of(message.get("content", "")) for message in content.messages]
    return all(line.strip() in text for part in said for line in part.splitlines())


def _found_content(fields: Fields, reading: Reading, where: str) -> str | Conversation:
    """Returns the text or conversation of a row whose layout is not set."""
    layouts = present_layouts(fields, reading)
    if len(layouts) == 2 and layouts[0] == "text":
        if reading.text_field != "text":
            return _content("text", fields, reading, where)
        made = _content(layouts[1], fields, reading, where)
        if _is_rendering(fields["text"], made):
            return made
    if len(layouts) == 1:
        return _content(layouts[0], fields, reading, where)
    if layouts:
        sides = [side for layout in layouts for side in reading.layouts()[layout]]
        shown = " and ".join(dict.fromkeys(repr(name) for side in sides for name in side if name in fields))
        message = f"{where}: has {shown}; wanted one of them. Set corpus.content={' or '.join(layouts)}."
        raise BadRowError(message, "several readings")
    raise BadRowError(
        f"{where}: no field {reading.text_field!r} (corpus.text_field), 'messages', 'conversations', 'prompt' and "
        f"'completion', or 'instruction' and 'output'. It has {', '.join(sorted(map(repr, fields))) or 'none'}."
        f"{setting_hint(fields)}",
        "no field that is known",
    )


def content_of(fields: Fields, reading: Reading, where: str) -> str | Conversation:
    """Returns the text or conversation that a row holds in exactly one layout.

    Raises:
        BadRowError: it holds none, or several of which none is named, or something of another type.
    """
    made = _content_without_tools(fields, reading, where)
    return made if isinstance(made, str) else made._replace(tools=tools_of(fields.get("tools"), where))


def _content_without_tools(fields: Fields, reading: Reading, where: str) -> str | Conversation:
    if reading.fields:
        return _mapped(reading.fields, fields, where)
    if (layout := reading.content) == "auto":
        return _found_content(fields, reading, where)
    missing = [" or ".join(side) for side in reading.layouts()[layout] if not set(side) & set(fields)]
    _refuse_missing(missing, fields, where, f"corpus.content={layout}")
    return _content(layout, fields, reading, where)
