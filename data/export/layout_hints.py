"""Settings by which a row of an unknown layout might be read, to be pasted."""

import json
import shlex
from collections.abc import Mapping
from typing import Any, cast

# What data sets call the two sides, or a text, for a hint.
PROMPTS = ("prompt", "question", "query", "instruction", "problem", "input", "user", "human", "request")
COMPLETIONS = (
    "completion", "response", "answer", "output", "chosen", "solution", "assistant", "reply", "target", "answers",
)  # fmt: skip


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
        if turns and isinstance(turns[0], dict) and len(cast(dict[str, Any], turns[0])) > 1:
            texts = {key: item for key, item in cast(dict[str, Any], turns[0]).items() if isinstance(item, str)}
            if len(texts) > 1:
                role, *_, content = sorted(texts, key=lambda key: len(texts[key]))
                return f" Is it {setting(fields={'messages': name, 'role': role, 'content': content})}?"
    prompt = next((lower[name] for name in PROMPTS if name in lower), None)
    completion = next((lower[name] for name in COMPLETIONS if name in lower and lower[name] != prompt), None)
    if prompt and completion:
        return f" Is it {setting(fields={'prompt': prompt, 'completion': completion})}?"
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    if texts:
        return f" Is it {setting(text_field=max(texts, key=lambda name: len(texts[name])))}?"
    return f" Name its fields: {setting(fields={'prompt': 'FIELD', 'completion': 'FIELD'})}."
