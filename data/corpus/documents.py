"""What a corpus is made of: a document, and how a row of a file becomes one."""

import hashlib
import json
from typing import NamedTuple

from data.corpus.chat.conversations import Conversation
from data.corpus.file_rows import Row
from data.corpus.row_layouts import Reading, content_of
from data.text_lines import BadRowError


class Document(NamedTuple):
    """A name that stays the same between exports, what is in it (text, or a conversation), and where it lies."""

    name: str
    content: str | Conversation
    where: str = ""

    def digest(self) -> bytes:
        """Returns 16 bytes by which documents of the same content are known, whatever they are called."""
        known = self.content
        if isinstance(known, Conversation) and known.tools is None:
            known = known[:2]  # as before there were tools
        written = json.dumps(known, sort_keys=True, default=str)
        return hashlib.sha256(written.encode()).digest()[:16]


def document_of(row: Row, reading: Reading) -> Document:
    """The document of a row.

    Raises:
        BadRowError: the row could not be read, or holds nothing that `reading` names, or something of another type.
    """
    if isinstance(row.value, BadRowError):
        raise row.value
    if isinstance(row.value, str):
        return Document(row.name, row.value, row.where)
    return Document(row.name, content_of(row.value, reading, row.where), row.where)
