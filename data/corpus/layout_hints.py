"""Settings by which a row of an unknown layout might be read, to be pasted."""

import json
import shlex
from collections.abc import Mapping
from typing import Any, cast

# What data sets call the two sides, and the one who speaks.
PROMPTS = ("prompt", "question", "query", "instruction", "problem", "input", "user", "human", "request")
COMPLETIONS = (
    "completion", "response", "answer", "output", "chosen", "solution", "assistant", "reply", "target", "answers",
)  # fmt: skip
ROLES = ("role", "from", "speaker", "author", "sender")


def setting(**settings: Any) -> str:
    """A setting of the corpus as it stands on a command line."""
    [(name, value)] = settings.items()
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "--config=" + shlex.quote(f"corpus.{name}={written}")


def setting_hint(fields: Mapping[str, Any]) -> str:
    """A setting by which the row might be read, to be pasted."""
    lower = {name.lower(): name for name in reversed(list(fields)) if isinstance(fields[name], (str, list))}
    for name, value in fields.items():
        turns = cast(list[Any], value) if isinstance(value, list) else []
        turn = cast(dict[str, Any], turns[0]) if turns and isinstance(turns[0], dict) else {}
        texts = sorted((key for key in turn if isinstance(turn[key], str)), key=lambda key: len(turn[key]))
        if {"role", "content"} <= set(turn) or {"from", "value"} <= set(turn):
            return f" Is it {setting(fields={'messages': name})}?"
        if len(texts) > 1:
            role = next((key for key in ROLES if key in texts), texts[0])
            content = next(key for key in reversed(texts) if key != role)
            return f" Is it {setting(fields={'messages': name, 'role': role, 'content': content})}?"
    prompt = next((lower[name] for name in PROMPTS if name in lower), None)
    completion = next((lower[name] for name in COMPLETIONS if name in lower and lower[name] != prompt), None)
    if prompt and completion:
        return f" Is it {setting(fields={'prompt': prompt, 'completion': completion})}?"
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    if texts:
        return f" Is it {setting(text_field=max(texts, key=lambda name: len(fields[name])))}?"
    return f" Name its fields: {setting(fields={'prompt': 'FIELD', 'completion': 'FIELD'})}."
