"""Layouts of corpus rows: the fields in which data sets keep texts and conversations, and how they are read.

| layout | fields | as in |
|---|---|---|
| text | `text` (or `corpus.text_field`) | plain text |
| messages | `messages`, of role and content | OpenAI, TRL |
| conversations | `conversations`, of from and value (or role and content) | ShareGPT, OpenHermes |
| completion | `prompt` and `completion` | TRL |
| instruction | `instruction`, `input` or `context`, `output` or `response`, `history` | Alpaca, Dolly |
| question | `question` and `response` | OpenOrca |
| tokens | `tokens`, `loss_mask` (`data/corpus/token_rows.py`) | ids of the teacher's tokenizer |

A field `system` or `system_prompt` beside any of them but `text` is the system message, where the messages have none.
Fields of other names are given by `corpus.fields`.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

from data.corpus.chat.conversations import (
    ROLES,
    Conversation,
    Message,
    PlainPrompt,
    content_as_text,
    parse_call_message,
    parse_conversation,
    parse_prompt_completion,
    parse_tools,
)
from data.corpus.layout_hints import config_flag, suggest_setting
from data.corpus.token_rows import TOKEN_FIELDS, Content, parse_tokens
from data.text_lines import BadRowError

Fields = Mapping[str, Any]
# The fields of each layout. Of the alternatives in one tuple a row has any one.
LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("text",),),
    "messages": (("messages",),),
    "conversations": (("conversations", "conversation"),),
    "completion": (("prompt",), ("completion",)),
    "instruction": (("instruction",), ("output", "response")),
    "question": (("question",), ("response",)),
    "tokens": (("tokens",),),
}
OPTIONAL = ("system", "system_prompt", "input", "context", "history", "tools", *TOKEN_FIELDS)
CALL_ROLE = "function_call"
# Standard roles by the names that data sets use.
ROLE_NAMES = {
    **{role: role for role in (*ROLES, CALL_ROLE)},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "function", "ipython"), "tool"),
}
MAPPING_KEYS = ("text", "messages", "role", "content", "prompt", "completion", "system")


class RowFormat(NamedTuple):
    """Settings of a corpus that determine how its rows are read. `content` is a layout or `auto`."""

    content: str = "auto"
    text_field: str = "text"
    fields: Mapping[str, str] | None = None

    def layouts(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Returns `LAYOUTS` with the set name of the text field."""
        return {**LAYOUTS, "text": ((self.text_field,),)}


def check_fields(fields: Mapping[str, str]) -> None:
    """Refuses a mapping of fields that describes no document, or more than one.

    Raises:
        ValueError: the message names the keys that a mapping may have.
    """
    unknown = sorted(set(fields) - set(MAPPING_KEYS))
    kinds = [kind for kind in ("text", "messages", "prompt") if kind in fields]
    if unknown or len(kinds) != 1 or ("prompt" in fields) != ("completion" in fields):
        raise ValueError(
            "wanted a field of the rows for 'text', for 'messages' (with 'role' and 'content' where its items use "
            "other names), or for both 'prompt' and 'completion' (with 'system')"
        )


def matching_layouts(names: Collection[str], row_format: RowFormat) -> list[str]:
    """Returns the layouts whose fields are all among `names`."""
    return [
        layout
        for layout, groups in row_format.layouts().items()
        if all(any(name in names for name in group) for group in groups)
    ]


def columns_to_read(columns: Collection[str], row_format: RowFormat) -> list[str]:
    """Returns the columns that a document can be made of. Where there are none it returns all, for an error to name."""
    if row_format.fields:
        used = {*row_format.fields.values(), "tools", "teacher_prompt"}
    else:
        used = {name for groups in row_format.layouts().values() for group in groups for name in group} | set(OPTIONAL)
        used = used if matching_layouts(columns, row_format) else set(columns)
    return [name for name in columns if name in used] or list(columns)


def _one_of(fields: Fields, names: tuple[str, ...], where: str) -> str | None:
    """Returns the one of several alternative names that a row has, or None.

    Raises:
        BadRowError: the row has more than one of them.
    """
    present = [name for name in names if name in fields]
    if len(present) > 1:
        message = (
            f"{where}: has both {present[0]!r} and {present[1]!r}; wanted one of them. Name the fields that count: "
            f"{config_flag(fields={'prompt': 'FIELD', 'completion': 'FIELD'})}."
        )
        raise BadRowError(message, "several readings")
    return present[0] if present else None


def _text(fields: Fields, field: str, where: str) -> str:
    if not isinstance(value := fields[field], str):
        message = f"{where}: {field!r} is a {type(value).__name__}, wanted text."
        raise BadRowError(message, "a field of another type")
    return value


def _standard_message(value: Any, where: str, role_field: str, content_field: str) -> Any:
    """Returns a message with its role and content under the standard names.

    Anything else is returned as it is, so that a later check can refuse it by name.
    """
    if not isinstance(value, dict):
        return value
    message = cast(dict[str, Any], value)
    if role_field not in message and "from" in message:
        role_field, content_field = "from", "value"
    role, content = message.get(role_field), message.get(content_field)
    standard_role = ROLE_NAMES.get(role.lower()) if isinstance(role, str) else None
    if standard_role in (None, role) and (role_field, content_field) == ("role", "content"):
        return message
    rest = {key: item for key, item in message.items() if key not in (role_field, content_field)}
    if standard_role == CALL_ROLE:
        return {**rest, **parse_call_message(content, where)}
    standard = {"role": standard_role or role, "content": content}
    return {**rest, **{key: item for key, item in standard.items() if item is not None}}


def _messages(value: Any, where: str, field: str, names: tuple[str, str] = ("role", "content")) -> list[Message]:
    """Returns the messages in a field. The list may also be JSON text, as in CSV."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRowError(f"{where}: {field!r} is text, but not a JSON list. Fix it.", "not JSON") from None
    if isinstance(value, list):
        turns = enumerate(cast(list[Any], value))
        value = [_standard_message(turn, f"{where}: {field}[{i}]", *names) for i, turn in turns]
    return parse_conversation(value, where, field).messages


def _side(value: Any, where: str, field: str) -> Any:
    return _messages(value, where, field) if isinstance(value, list) else value


def _with_system(chat: Conversation, fields: Fields, field: str | None, where: str) -> Conversation:
    """Puts the system message of a field in front of a conversation that has none."""
    if field is None or chat.messages[0]["role"] in ("system", "developer") or not _text(fields, field, where).strip():
        return chat
    system = {"role": "system", "content": fields[field]}
    return Conversation(*chat)._replace(
        messages=[system, *chat.messages], scored_from=chat.scored_from + bool(chat.scored_from)
    )


def _instruction_messages(fields: Fields, where: str) -> list[Message]:
    """Returns the messages of a row of Alpaca or Dolly.

    The input is put behind its instruction, after a blank line. Pairs of `history` come first.
    """
    context, answer = _one_of(fields, ("input", "context"), where), _one_of(fields, ("output", "response"), where)
    parts = [_text(fields, name, where) for name in ("instruction", context) if name]
    pairs = [*cast(list[Any], fields.get("history", [])), ["\n\n".join(part for part in parts if part.strip()), None]]
    pairs[-1][1] = _text(fields, answer, where) if answer else ""
    if not all(isinstance(pair, list) and len(cast(list[Any], pair)) == 2 for pair in pairs):
        raise BadRowError(f"{where}: 'history' is not a list of pairs. Fix it.", "a field of another type")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _layout_content(layout: str, fields: Fields, row_format: RowFormat, where: str) -> Content:
    """Returns the text or conversation of a row in a given layout."""
    if layout == "text":
        return _text(fields, row_format.text_field, where)
    if layout == "tokens":
        return parse_tokens(fields, where)
    system = next((name for name in ("system", "system_prompt") if name in fields), None)
    if layout == "completion":
        return _with_system(_prompt_completion(fields["prompt"], fields["completion"], where), fields, system, where)
    if layout == "instruction":
        messages = _instruction_messages(fields, where)
    elif layout == "question":
        sides = (("user", "question"), ("assistant", "response"))
        messages = [{"role": role, "content": _text(fields, name, where)} for role, name in sides]
    else:
        field = next(name for name in LAYOUTS[layout][0] if name in fields)
        messages = _messages(fields[field], where, field)
    return _with_system(parse_conversation(messages, where, layout), fields, system, where)


def _prompt_completion(prompt: Any, completion: Any, where: str) -> Conversation:
    chat = parse_prompt_completion(_side(prompt, where, "prompt"), _side(completion, where, "completion"), where)
    plain = isinstance(prompt, str) and isinstance(completion, str)
    return PlainPrompt(*chat) if plain else chat


def _mapped_content(mapping: Mapping[str, str], fields: Fields, where: str) -> str | Conversation:
    """Returns the text or conversation in the fields that `corpus.fields` names."""
    needed = [name for name in ("text", "messages", "prompt", "completion") if name in mapping]
    _refuse_missing([mapping[name] for name in needed], fields, where, f"corpus.fields={dict(mapping)}")
    if "text" in mapping:
        return _text(fields, mapping["text"], where)
    if "messages" in mapping:
        names = mapping.get("role", "role"), mapping.get("content", "content")
        field = mapping["messages"]
        chat = Conversation(_messages(fields[field], where, field, names))
    else:
        chat = _prompt_completion(fields[mapping["prompt"]], fields[mapping["completion"]], where)
    system = mapping.get("system")
    return _with_system(chat, fields, system if system in fields else None, where)


def _refuse_missing(names: Collection[str], fields: Fields, where: str, setting: str) -> None:
    missing = [name for name in names if name not in fields]
    if missing:
        has = ", ".join(sorted(map(repr, fields))) or "no field"
        message = f"{where}: no field {missing[0]!r}; wanted it for {setting}. The row has {has}."
        raise BadRowError(message, "a field is missing")


def _is_rendering(text: Any, content: Content) -> bool:
    """Returns True where a text holds every line of a conversation: it is the same, rendered by some chat template."""
    if not isinstance(text, str) or not isinstance(content, Conversation):
        return False
    contents = [content_as_text(message.get("content", "")) for message in content.messages]
    return all(line.strip() in text for content_text in contents for line in content_text.splitlines())


def _detected_content(fields: Fields, row_format: RowFormat, where: str) -> Content:
    """Returns the text or conversation of a row whose layout is not set."""
    layouts = matching_layouts(fields, row_format)
    if len(layouts) == 2 and layouts[0] == "text":
        if row_format.text_field != "text":
            return _layout_content("text", fields, row_format, where)
        # A text beside a conversation is no second document where it is only its rendering.
        chat = _layout_content(layouts[1], fields, row_format, where)
        if _is_rendering(fields["text"], chat):
            return chat
    if len(layouts) == 1:
        return _layout_content(layouts[0], fields, row_format, where)
    if layouts:
        groups = [group for layout in layouts for group in row_format.layouts()[layout]]
        shown = " and ".join(dict.fromkeys(repr(name) for group in groups for name in group if name in fields))
        message = f"{where}: has {shown}; wanted one of them. Set corpus.content={' or '.join(layouts)}."
        raise BadRowError(message, "several readings")
    raise BadRowError(
        f"{where}: no field {row_format.text_field!r} (corpus.text_field), 'messages', 'conversations', 'prompt' and "
        f"'completion', 'instruction' and 'output', or 'tokens'. "
        f"It has {', '.join(sorted(map(repr, fields))) or 'none'}.{suggest_setting(fields)}",
        "no field that is known",
    )


def parse_content(fields: Fields, row_format: RowFormat, where: str) -> Content:
    """Returns the text or conversation that a row holds in exactly one layout.

    Raises:
        BadRowError: the row matches no layout, or several of which none is set, or has a field of another type.
    """
    content = _content_without_tools(fields, row_format, where)
    if not isinstance(content, Conversation):
        return content
    return content._replace(tools=parse_tools(fields.get("tools"), where))


def _content_without_tools(fields: Fields, row_format: RowFormat, where: str) -> Content:
    if row_format.fields:
        return _mapped_content(row_format.fields, fields, where)
    if (layout := row_format.content) == "auto":
        return _detected_content(fields, row_format, where)
    missing = [" or ".join(group) for group in row_format.layouts()[layout] if not set(group) & set(fields)]
    _refuse_missing(missing, fields, where, f"corpus.content={layout}")
    return _layout_content(layout, fields, row_format, where)
