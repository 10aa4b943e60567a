"""The chat format of a run's caches, which the export of the student needs."""

import logging

from data.cache.manifest import Manifest
from data.stream.source import Source
from kd_core.files import damage_as_usage_error
from kd_core.json_fields import check_integer, check_object, check_text
from kd_core.students.huggingface.export_files import ChatFormat

log = logging.getLogger("kd")
MOST_ID = 1 << 32


def _read_format(manifest: Manifest, path: str) -> ChatFormat | None:
    """Returns the format that a manifest states. It is checked strictly, because anybody may have written the file."""
    if (stated := manifest.made.get("chat")) is None:
        return None
    with damage_as_usage_error(f"{path}: manifest.json", "how conversations were written"):
        optional = {"tool_use"} & set(check_object(stated, "chat"))
        fields = check_object(stated, "chat", {"template", "special_tokens", "turn_ends"} | optional)
        special_tokens = {
            name: check_text(token, name)
            for name, token in check_object(fields["special_tokens"], "special_tokens").items()
        }
        turn_ends = {
            name: check_integer(token_id, name, 0, MOST_ID)
            for name, token_id in check_object(fields["turn_ends"], "turn_ends").items()
        }
        tool_template = check_text(fields["tool_use"], "tool_use") if optional else None
        return ChatFormat(check_text(fields["template"], "template"), special_tokens, turn_ends, tool_template)


def chat_format(source: Source) -> ChatFormat | None:
    """Returns the chat format of the training caches, or None where they hold no conversations or differ in it.

    Raises:
        UsageError: a cache cannot be read.
    """
    by_path = {part.path: form for part in source.parts if (form := _read_format(part.manifest, part.path))}
    formats = list(by_path.values())
    if any(form != formats[0] for form in formats):
        log.warning(
            "export: conversations of %s were written by different chat templates; the student keeps its own",
            ", ".join(by_path),
        )
        return None
    return formats[0] if formats else None
