"""The format of conversations in a run's caches, which an export of the student needs."""

import logging

from data.cache.manifest import Manifest
from data.stream.source import Source
from kd_core.files import damaged
from kd_core.json_fields import fields, integer, text
from kd_core.students.huggingface.export_files import ChatFormat

log = logging.getLogger("kd")
MOST_ID = 1 << 32


def _read(manifest: Manifest, path: str) -> ChatFormat | None:
    """Returns the format that a manifest states, strictly: somebody else may have written it."""
    if (stated := manifest.made.get("chat")) is None:
        return None
    with damaged(f"{path}: manifest.json", "how conversations were written"):
        optional = {"tool_use"} & set(fields(stated, "chat"))
        found = fields(stated, "chat", {"template", "special_tokens", "turn_ends"} | optional)
        special = {name: text(each, name) for name, each in fields(found["special_tokens"], "special_tokens").items()}
        ends = {name: integer(each, name, 0, MOST_ID) for name, each in fields(found["turn_ends"], "turn_ends").items()}
        for_tools = text(found["tool_use"], "tool_use") if optional else None
        return ChatFormat(text(found["template"], "template"), special, ends, for_tools)


def chat_format(source: Source) -> ChatFormat | None:
    """Returns the chat format of what is trained on; None without conversations, or where caches differ in it.

    Raises:
        UsageError: a cache cannot be read.
    """
    found = {part.path: form for part in source.parts if (form := _read(part.manifest, part.path))}
    forms = list(found.values())
    if any(form != forms[0] for form in forms):
        log.warning(
            "export: conversations of %s were written by different chat templates; the student keeps its own",
            ", ".join(found),
        )
        return None
    return forms[0] if forms else None
