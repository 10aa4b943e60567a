"""Documents, the units of a corpus, and their construction from rows of files."""

import hashlib
import json
from typing import NamedTuple

from data.corpus.chat.conversations import Conversation
from data.corpus.file_rows import Row
from data.corpus.row_layouts import RowFormat, parse_content
from data.text_lines import BadRowError


class Document(NamedTuple):
    """A text or a conversation, with a name that stays the same between exports, and its place in a file."""

    name: str
    content: str | Conversation
    where: str = ""

    def digest(self) -> bytes:
        """Returns 16 bytes that identify the content, whatever the document's name."""
        content = self.content
        if isinstance(content, Conversation) and content.tools is None:
            content = content[:2]  # digests from before conversations had tools stay valid
        content_json = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(content_json.encode()).digest()[:16]


def document_from_row(row: Row, row_format: RowFormat) -> Document:
    """Returns the document in a row.

    Raises:
        BadRowError: the row could not be read, has no field that `row_format` names, or one of another type.
    """
    if isinstance(row.value, BadRowError):
        raise row.value
    if isinstance(row.value, str):
        return Document(row.name, row.value, row.where)
    return Document(row.name, parse_content(row.value, row_format, row.where), row.where)
