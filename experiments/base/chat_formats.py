"""The format of conversations in a run's caches, which an export of the student needs."""

import logging

from data.cache.manifest import Manifest
from data.stream.source import Source
from kd_core.files import damage_as_usage_error
from kd_core.json_fields import check_integer, check_object, check_text
from kd_core.students.huggingface.export_files import ChatFormat

log = logging.getLogger("kd")
MOST_ID = 1 << 32


def _read(manifest: Manifest, path: str) -> ChatFormat | None:
    """Returns the format that a manifest states, strictly: somebody else may have written it."""
    if (stated := manifest.made.get("chat")) is None:
        return None
    with damage_as_usage_error(f"{path}: manifest.json", "how conversations were written"):
        optional = {"tool_use"} & set(check_object(stated, "chat"))
        found = check_object(stated, "chat", {"template", "special_tokens", "turn_ends"} | optional)
        special = {
            name: check_text(each, name)
            for name, each in check_object(found["special_tokens"], "special_tokens").items()
        }
        ends = {
            name: check_integer(each, name, 0, MOST_ID)
            for name, each in check_object(found["turn_ends"], "turn_ends").items()
        }
        for_tools = check_text(found["tool_use"], "tool_use") if optional else None
        return ChatFormat(check_text(found["template"], "template"), special, ends, for_tools)


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
