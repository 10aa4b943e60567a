"""Rows that are token ids already, and prompts that the teacher alone reads.

    {"tokens": [5, 9, 2], "loss_mask": [0, 1, 1], "name": "a", "tokenizer": "FINGERPRINT"}
    {"prompt": "2 + 2?", "completion": "4", "teacher_prompt": "You are good at sums. 2 + 2?"}

With `teacher_prompt`, the student reads prompt and completion, and the teacher scores the same completion behind its
own prompt. The completion begins at the first token that is scored.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from data.corpus.chat.conversations import Conversation, PlainPrompt, parse_conversation
from data.text_lines import BadRowError

MOST_ID = 1 << 31
TOKEN_FIELDS = ("loss_mask", "name", "tokenizer", "teacher_prompt")


class TokenRow(NamedTuple):
    """Token ids, and for each whether it is scored as a label, 0 or 1. The first token has nothing before it."""

    token_ids: list[int]
    loss_mask: list[int]
    tokenizer: str | None = None  # the fingerprint of the tokenizer that made them


Content = str | Conversation | TokenRow


def _integers(value: Any, field: str, where: str, below: int, least: int = 1) -> list[int]:
    """Returns a list of integers from 0 to below `below`, with at least so many elements."""
    items = cast(list[Any], value)
    if not isinstance(value, list) or len(items) < least or not all(type(i) is int and 0 <= i < below for i in items):
        message = f"{where}: {field!r} is no list of {least} or more integers from 0 to {below - 1}. Fix it."
        raise BadRowError(message, "token ids that are none")
    return items


def parse_tokens(fields: Mapping[str, Any], where: str) -> TokenRow:
    """Returns the ids of a row.

    Raises:
        BadRowError: a field has another type, or the mask another length.
    """
    ids = _integers(fields["tokens"], "tokens", where, MOST_ID)
    mask = _integers(fields.get("loss_mask", [1] * len(ids)), "loss_mask", where, 2)
    if len(mask) != len(ids):
        message = f"{where}: 'loss_mask' has {len(mask)} elements and 'tokens' {len(ids)}; wanted as many. Fix it."
        raise BadRowError(message, "a loss mask of another length")
    tokenizer = fields.get("tokenizer")
    if not isinstance(tokenizer, str | None):
        raise BadRowError(f"{where}: 'tokenizer' is no text; wanted a fingerprint.", "a field of another type")
    return TokenRow(ids, mask, tokenizer)


def with_teacher_prompt(content: Content, prompt: Any, where: str) -> Content:
    """Returns what the teacher reads: the content with another prompt before the same completion.

    Args:
        content: what the student reads.
        prompt: of tokens, a list of ids. Of a prompt and its completion, the user's text. Of a conversation, the text
            of the system message. Of both, also a list of the messages before the assistant's first scored one.

    Raises:
        BadRowError: the content has no completion, or the prompt is something else.
    """
    if isinstance(content, TokenRow):
        ids = _integers(prompt, "teacher_prompt", where, MOST_ID)
        begin = next((i for i, scored in enumerate(content.loss_mask) if i and scored), len(content.token_ids))
        return TokenRow([*ids, *content.token_ids[begin:]], [0] * len(ids) + content.loss_mask[begin:])
    if isinstance(content, str):
        message = f"{where}: has 'teacher_prompt' beside a plain text, which has no completion. Drop the field."
        raise BadRowError(message, "a teacher_prompt without a completion")
    if not isinstance(prompt, str | list):
        message = f"{where}: 'teacher_prompt' is a {type(prompt).__name__}, wanted text or a list. Fix it."
        raise BadRowError(message, "a field of another type")
    messages = content.messages
    roles = [message["role"] for message in messages]
    begin = content.scored_from or (roles.index("assistant") if "assistant" in roles else len(roles))
    if isinstance(prompt, list):
        before = parse_conversation(prompt, where, "teacher_prompt").messages
    elif content.scored_from:
        before = [message for message in messages[:1] if message["role"] == "system"]
        before = [*before, {"role": "user", "content": prompt}]
    else:
        before = [message for message in messages[:begin] if message["role"] != "system"]
        before = [{"role": "system", "content": prompt}, *before]
    teacher = Conversation([*before, *messages[begin:]], len(before), content.tools)
    is_plain = isinstance(content, PlainPrompt) and isinstance(prompt, str)
    return PlainPrompt(*teacher) if is_plain and len(before) == 1 else teacher
