"""Conversations, checked: `messages` as chat data sets write them, or a prompt and its completion."""

from typing import Any, NamedTuple, cast

from kd_core.errors import UsageError

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


class Conversation(NamedTuple):
    """Messages in order. The assistant's are scored, from number `scored_from` on; those before are a prompt."""

    messages: list[Message]
    scored_from: int = 0


class PlainPrompt(Conversation):
    """A prompt and its completion, both text: a conversation, or one text where the teacher has no chat template."""

    __slots__ = ()


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: is a {type(value).__name__}, wanted an object with 'role' and 'content'.")
    # Parquet gives every message every key of any message; null stands for "not there".
    message = {key: item for key, item in cast(Message, value).items() if item is not None}
    role, content = message.get("role"), message.get("content")
    if role is None:
        raise UsageError(f"{where}: no 'role'; wanted one of {', '.join(ROLES)}. It has {sorted(message)}.")
    if role not in ROLES:
        raise UsageError(f"{where}: role is {role!r}; wanted one of {', '.join(ROLES)}. Rename it.")
    calls = role == "assistant" and bool(message.get("tool_calls"))
    if content is None and not calls:
        raise UsageError(f"{where}: no 'content'; wanted the text of the {role}'s message. It has {sorted(message)}.")
    if content is not None and not isinstance(content, str):
        raise UsageError(
            f"{where}: 'content' is a {type(content).__name__}, wanted text. Join parts into one text; images and "
            "the like cannot be scored."
        )
    if role == "assistant" and not calls and not str(content).strip():
        raise UsageError(f"{where}: the assistant's 'content' is empty; wanted text to learn from. Drop the row.")
    return {**message, "content": content or ""}


def conversation(value: Any, where: str, field: str = "messages") -> Conversation:
    """A conversation from a list of messages; keys beyond `role` and `content` go to the template as they are.

    Raises:
        UsageError: not a list, empty, or a message without a known role and text.
    """
    if not isinstance(value, list):
        raise UsageError(f"{where}: {field!r} is a {type(value).__name__}, wanted a list of messages.")
    items = cast(list[Any], value)
    if not items:
        raise UsageError(f"{where}: {field!r} is empty, wanted one message or more. Drop the row.")
    return Conversation([_message(item, f"{where}: {field}[{i}]") for i, item in enumerate(items)])


def _side(value: Any, role: str, field: str, where: str) -> list[Message]:
    if isinstance(value, str):
        return [_message({"role": role, "content": value}, f"{where}: {field}")]
    if not isinstance(value, list):
        raise UsageError(f"{where}: {field!r} is a {type(value).__name__}, wanted text or a list of messages.")
    return conversation(cast(list[Any], value), where, field).messages


def completed_prompt(prompt: Any, completion: Any, where: str) -> Conversation:
    """A conversation from a prompt and its completion, each text (of the user, of the assistant) or messages.

    Raises:
        UsageError: as `conversation`.
    """
    before = _side(prompt, "user", "prompt", where)
    return Conversation([*before, *_side(completion, "assistant", "completion", where)], len(before))
