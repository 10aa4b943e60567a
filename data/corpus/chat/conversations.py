"""Conversations with checked messages and tools, from `messages` of chat data sets or a prompt and its completion."""

import json
from typing import Any, NamedTuple, cast

from data.text_lines import BadRowError, drop_nulls

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


class Conversation(NamedTuple):
    """Messages in order, and the tools that they may call.

    The assistant's messages from index `scored_from` on are scored. Those before it are a prompt.
    """

    messages: list[Message]
    scored_from: int = 0
    tools: list[Any] | None = None


def _present(value: Any, where: str) -> Any:
    """Returns the value without the keys that hold null.

    Parquet gives each object all keys of any object in its column, and null stands for a missing key.
    """
    try:
        return drop_nulls(value)
    except RecursionError:
        raise BadRowError(f"{where}: nests too deeply.", "nesting too deep") from None


def _part(value: Any, where: str) -> Message:
    """Returns one part of a content of several parts. It must be text."""
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if isinstance(value, dict) and isinstance(cast(Message, value).get("text"), str):
        return {"type": "text", **cast(Message, value)}
    kind = cast(Message, value).get("type") if isinstance(value, dict) else type(value).__name__
    raise BadRowError(
        f"{where}: a part of 'content' is {kind!r}, wanted text. Images and the like cannot be scored. Drop the row.",
        "content with a part that is no text",
    )


def content_as_text(content: str | list[Message]) -> str:
    """Returns a content as one text. Parts are joined by newlines, as inference servers join them."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _content(value: Any, where: str) -> str | list[Message]:
    if isinstance(value, list):
        return [_part(part, where) for part in cast(list[Any], value)]
    if isinstance(value, str):
        return value
    raise BadRowError(
        f"{where}: 'content' is a {type(value).__name__}, wanted text or a list of parts that are text.",
        "content that is not text",
    )


def _calls(value: Any, where: str) -> list[Message]:
    calls = cast(list[Any], value)
    if isinstance(value, list) and all(isinstance(call, dict) for call in calls):
        return calls
    raise BadRowError(f"{where}: 'tool_calls' is not a list of objects.", "tool calls that are no objects")


class PlainPrompt(Conversation):
    """A prompt and its completion, both text: a conversation, or one text where the teacher has no chat template."""

    __slots__ = ()


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise BadRowError(
            f"{where}: is a {type(value).__name__}, wanted an object with 'role' and 'content'.", "message is no object"
        )
    message = cast(Message, _present(value, where))
    role, content = message.get("role"), message.pop("content", None)
    if role is None:
        raise BadRowError(f"{where}: no 'role'; wanted one of {', '.join(ROLES)}. It has {sorted(message)}.", "no role")
    if role not in ROLES:
        raise BadRowError(
            f"{where}: role is {role!r}; wanted one of {', '.join(ROLES)}. Rename it.", "a role of another name"
        )
    # Leave an empty list of calls out: templates would treat it as a call.
    calls = _calls(message.pop("tool_calls", []), where)
    if calls:
        message["tool_calls"] = calls
    if content is not None:
        message["content"] = content = _content(content, where)
    elif role != "assistant" or not calls:
        raise BadRowError(
            f"{where}: no 'content'; wanted the text of the {role}'s message. It has {sorted(message)}.", "no content"
        )
    if role == "assistant" and not calls and not content_as_text(message["content"]).strip():
        raise BadRowError(
            f"{where}: the assistant's 'content' is empty; wanted text to learn from. Drop the row.",
            "empty assistant turn",
        )
    return message


def _messages(value: Any, where: str, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadRowError(
            f"{where}: {field!r} is a {type(value).__name__}, wanted a list of messages.", "messages are no list"
        )
    if not value:
        raise BadRowError(f"{where}: {field!r} is empty, wanted one message or more. Drop the row.", "no messages")
    return [_message(item, f"{where}: {field}[{i}]") for i, item in enumerate(cast(list[Any], value))]


def parse_call_message(value: Any, where: str) -> Message:
    """Returns the message of a function call in ShareGPT's format, which is JSON.

    Raises:
        BadRowError: it is not that.
    """
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        calls = cast(list[Any], parsed if isinstance(parsed, list) else [parsed])
        named = [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
    except (ValueError, TypeError, KeyError, RecursionError):
        message = f"{where}: a function call that is not JSON with 'name' and 'arguments' ({value!a:.80}). Fix it."
        raise BadRowError(message, "a function call that is not JSON") from None
    return {"role": "assistant", "tool_calls": named}


def parse_tools(value: Any, where: str) -> list[Any] | None:
    """Returns the tools of a row, or None where it has none.

    Args:
        value: a list of JSON schemas, or its JSON text.

    Raises:
        BadRowError: it is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair raises here
        except (ValueError, RecursionError):
            raise BadRowError(f"{where}: 'tools' is a text that is not JSON.", "tools are not JSON") from None
    else:
        value = _present(value, where)
    if not isinstance(value or [], list) or not all(isinstance(tool, dict) for tool in value or []):
        raise BadRowError(f"{where}: 'tools' is not a list of objects; wanted JSON schemas.", "tools are no objects")
    return value or None


def parse_conversation(value: Any, where: str, field: str = "messages", tools: Any = None) -> Conversation:
    """Builds a conversation from a list of messages. Keys beyond `role` and `content` are passed on to the template.

    Raises:
        BadRowError: it is not a list or empty, a message has no known role or no text, or tools are no JSON schemas.
    """
    return Conversation(_messages(value, where, field), 0, parse_tools(tools, where))


def _side(value: Any, role: str, field: str, where: str) -> list[Message]:
    if isinstance(value, str):
        return [_message({"role": role, "content": value}, f"{where}: {field}")]
    if not isinstance(value, list):
        raise BadRowError(
            f"{where}: {field!r} is a {type(value).__name__}, wanted text or a list of messages.",
            "neither text nor messages",
        )
    return _messages(cast(list[Any], value), where, field)


def parse_prompt_completion(prompt: Any, completion: Any, where: str, tools: Any = None) -> Conversation:
    """Builds a conversation from a prompt and its completion.

    Each is a list of messages, or a text: the user's of a prompt, the assistant's of a completion.

    Raises:
        BadRowError: as `parse_conversation`.
    """
    before = _side(prompt, "user", "prompt", where)
    after = _side(completion, "assistant", "completion", where)
    return Conversation([*before, *after], len(before), parse_tools(tools, where))
