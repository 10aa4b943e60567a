"""A corpus: files of documents, in a stable order; the documents' split into train and validation."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data.export.documents import CONTENTS, Document, document_of, wanted_keys
from data.export.rows import FORMATS, has_known_ending, rows_of
from data.tokenizer import Choice
from kd_core.errors import UsageError
from kd_core.files import content_fingerprint

log = logging.getLogger("kd")


class Known(Protocol):
    """What is split: anything that is known by its content."""

    @property
    def digest(self) -> bytes:
        """Of the document's content."""
        ...


D = TypeVar("D", bound=Known)


@dataclass(frozen=True)
class Corpus:
    """A file or a folder of text files, JSON lines and Parquet, also mixed.

    A row is text (its `text_field`), `messages`, or `prompt` and `completion`; `content` says which where a row has
    several of them. `bos` and `eos` say whether a text begins with the tokenizer's BOS and ends with its EOS (auto: as
    the tokenizer itself adds them). What comes of it stands in the plan, and is no part of the corpus.
    """

    path: str
    text_field: str = "text"
    content: str = "auto"
    bos: Choice = "auto"
    eos: Choice = "auto"

    def __post_init__(self) -> None:
        if self.content not in CONTENTS:
            raise UsageError(f"corpus.content: got {self.content!r}; wanted one of {', '.join(CONTENTS)}.")

    def files(self) -> list[Path]:
        """All files of the corpus, in a stable order.

        Raises:
            UsageError: there is none.
        """
        root = Path(self.path)
        if root.is_file():
            return [root]
        files = sorted(path for path in root.rglob("*") if has_known_ending(path) and path.is_file())
        if not files:
            *endings, last = FORMATS
            state = f"has no {', '.join(endings)} or {last} file" if root.is_dir() else "does not exist"
            raise UsageError(f"corpus {self.path}: {state}. Name a folder of them, or one such file.")
        return files

    def identity(self) -> dict[str, Any]:
        """What makes the corpus this one and no other: names and bytes of all files, and how they are read."""
        return {
            "fingerprint": content_fingerprint(self.files()),
            "text_field": self.text_field,
            "content": self.content,
        }

    def documents(self) -> Iterator[Document]:
        """All documents, one at a time: each text file, each line of JSON lines, each row of Parquet.

        Raises:
            UsageError: a file or a row cannot be read, or holds no document.
        """
        root, keys = Path(self.path), wanted_keys(self.text_field)
        for path in self.files():
            name = path.name if path == root else str(path.relative_to(root))
            for row in rows_of(path, name, keys):
                yield document_of(row, self.content, self.text_field)


def split_documents(documents: Sequence[D], share: float, seed: int) -> dict[str, list[D]]:
    """Divides whole documents into `train` and `validation`, by their content, the seed and the other documents.

    Neither names nor order matter, and documents of the same content stand on the same side.

    Raises:
        UsageError: fewer than two different documents, so that one side would be empty.
    """
    contents = {document.digest for document in documents}
    if len(contents) < 2:
        raise UsageError(
            f"the corpus has {len(contents)} different document(s) with something to score; wanted two or more, one "
            "to hold out. A .txt file, a line of a .jsonl file and a row of a .parquet file are each a document. Text "
            "of less than two tokens and conversations without the assistant's turn are left out."
        )
    if repeated := len(documents) - len(contents):
        log.info("corpus: %d of %d documents repeat the content of another", repeated, len(documents))
    held_out = min(len(contents) - 1, max(1, round(share * len(contents))))
    ranked = sorted(contents, key=lambda digest: hashlib.sha256(f"{seed} ".encode() + digest).digest())
    validation = set(ranked[:held_out])
    sides: dict[str, list[D]] = {"train": [], "validation": []}
    for document in documents:
        sides["validation" if document.digest in validation else "train"].append(document)
    return sides
