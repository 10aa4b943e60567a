"""Documents, the units of a corpus, and their construction from rows of files."""

import hashlib
import json
from typing import Any, NamedTuple

from data.corpus.chat.conversations import Conversation
from data.corpus.file_rows import Row
from data.corpus.row_layouts import RowFormat, parse_content
from data.corpus.token_rows import Content, TokenRow, with_teacher_prompt
from data.text_lines import BadRowError


class Document(NamedTuple):
    """A text, a conversation or token ids, with a name that stays the same between exports, and its place in a file.

    `teacher_content` is what the teacher reads, where it reads another prompt before the same completion.
    """

    name: str
    content: Content
    where: str = ""
    teacher_content: Content | None = None

    def digest(self) -> bytes:
        """Returns 16 bytes that identify the content, whatever the document's name and the teacher's context."""
        content: Any = self.content
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
    content, name, teacher_content = parse_content(row.value, row_format, row.where), row.name, None
    if "teacher_prompt" in row.value:
        teacher_content = with_teacher_prompt(content, row.value["teacher_prompt"], row.where)
    if isinstance(content, TokenRow) and "name" in row.value:
        name = row.value["name"]
        if not isinstance(name, str) or not name:
            raise BadRowError(f"{row.where}: 'name' is {name!r:.40}; wanted a text. Fix it.", "a name that is no text")
    return Document(name, content, row.where, teacher_content)
