"""Suggestions of settings for rows of an unknown layout, as flags to paste."""

import json
import shlex
from collections.abc import Mapping
from typing import Any, cast

# Names in data sets of the two sides of a conversation, and of the role of a message.
PROMPT_FIELDS = ("prompt", "question", "query", "instruction", "problem", "input", "user", "human", "request")
COMPLETION_FIELDS = (
    "completion", "response", "answer", "output", "chosen", "solution", "assistant", "reply", "target", "answers",
)  # fmt: skip
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")


def config_flag(**settings: Any) -> str:
    """Returns a setting of the corpus as a command line flag."""
    [(name, value)] = settings.items()
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "--config=" + shlex.quote(f"corpus.{name}={written}")


def suggest_setting(fields: Mapping[str, Any]) -> str:
    """Returns a question or request with a flag by which the row might be read."""
    lower = {name.lower(): name for name in reversed(list(fields)) if isinstance(fields[name], (str, list))}
    for name, value in fields.items():
        turns = cast(list[Any], value) if isinstance(value, list) else []
        turn = cast(dict[str, Any], turns[0]) if turns and isinstance(turns[0], dict) else {}
        texts = sorted((key for key in turn if isinstance(turn[key], str)), key=lambda key: len(turn[key]))
        if {"role", "content"} <= set(turn) or {"from", "value"} <= set(turn):
            return f" Is it {config_flag(fields={'messages': name})}?"
        if len(texts) > 1:
            role = next((key for key in ROLE_KEYS if key in texts), texts[0])
            content = next(key for key in reversed(texts) if key != role)
            return f" Is it {config_flag(fields={'messages': name, 'role': role, 'content': content})}?"
    prompt = next((lower[name] for name in PROMPT_FIELDS if name in lower), None)
    completion = next((lower[name] for name in COMPLETION_FIELDS if name in lower and lower[name] != prompt), None)
    if prompt and completion:
        return f" Is it {config_flag(fields={'prompt': prompt, 'completion': completion})}?"
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    if texts:
        return f" Is it {config_flag(text_field=max(texts, key=lambda name: len(fields[name])))}?"
    return f" Name its fields: {config_flag(fields={'prompt': 'FIELD', 'completion': 'FIELD'})}."
