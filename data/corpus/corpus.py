"""A corpus of documents, and their split into train and validation.

path ──corpus_files──► files ──read_rows──► rows ──document_from_row──► documents ──split_documents──► two sides
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data.corpus.bad_rows import BadRows, OnBadRow
from data.corpus.corpus_files import list_corpus_files
from data.corpus.corpus_sizes import corpus_fingerprint
from data.corpus.documents import Document, document_from_row
from data.corpus.file_rows import read_rows
from data.corpus.row_layouts import LAYOUTS, RowFormat, check_fields, columns_to_read
from data.tokenizer import AddToken
from kd_core.errors import UsageError
from kd_core.files import printable
from kd_core.ranges import NOT_NEGATIVE, check_settings

log = logging.getLogger("kd")


class HasDigest(Protocol):
    """A document identified by a hash of its content."""

    @property
    def digest(self) -> bytes:
        """Returns the hash of the document's content."""
        ...


D = TypeVar("D", bound=HasDigest)


@dataclass(frozen=True)
class Corpus:
    """A file, a folder or a data set of the hub, with texts and rows of JSON, CSV, Parquet and Arrow, also mixed.

    Args:
        path: a file, a folder, or `hub:OWNER/NAME[@REVISION][:FOLDER_OR_PATTERN]`.
        text_field: the field of a row that holds its text.
        content: the layout to read (`data/corpus/row_layouts.py`) where rows match several.
        fields: in place of these two, the names of fields that no layout knows, such as
            {"prompt": "question", "completion": "answer"},
            {"messages": "dialogue", "role": "speaker", "content": "utterance"} or {"text": "body"}; also "system".
        on_bad_row: stop with one message at a row that cannot be used, or skip it.
        most_bad_rows: the most rows that may be skipped. Below 1 it is a share of all rows, rounded up. From 1 on it
            is a number of rows.
        bos, eos: whether a text begins with the tokenizer's BOS and ends with its EOS (auto: as the tokenizer itself
            adds them). The tokens that result are recorded in the export plan, not in the corpus's identity.
    """

    path: str
    text_field: str = "text"
    content: str = "auto"
    fields: dict[str, str] | None = None
    on_bad_row: OnBadRow = "stop"
    most_bad_rows: float = 0.01
    bos: AddToken = "auto"
    eos: AddToken = "auto"

    def __post_init__(self) -> None:
        if self.content not in (contents := ("auto", *LAYOUTS)):
            raise UsageError(f"corpus.content: got {self.content!r}; wanted one of {', '.join(contents)}.")
        check_settings(self, "corpus.", most_bad_rows=NOT_NEGATIVE)
        if self.fields is not None:
            self._check_fields(self.fields)

    def _check_fields(self, mapping: dict[str, str]) -> None:
        try:
            check_fields(mapping)
        except ValueError as error:
            raise UsageError(f"corpus.fields: got {mapping}; {error}.") from None
        # With a mapping of fields, these settings would have no effect.
        conflicting = {"content": (self.content, "auto"), "text_field": (self.text_field, "text")}
        for name, (value, default) in conflicting.items():
            if value != default:
                raise UsageError(
                    f"corpus.fields and corpus.{name}: got {mapping} and {value!r}; wanted one of them, because each "
                    "says how rows are read. Remove one."
                )

    def files(self) -> list[Path]:
        """Lists all files of the corpus, in a stable order.

        Raises:
            UsageError: there is none, or one cannot be reached.
        """
        return list_corpus_files(self.path).files

    def identity(self) -> dict[str, Any]:
        """Returns what identifies the corpus: a hash of all files' names and bytes, and the settings that read them."""
        fields = {"fields": dict(self.fields)} if self.fields else {}
        return {
            "fingerprint": corpus_fingerprint(self.files()),
            "text_field": self.text_field,
            "content": self.content,
            **fields,
        }

    def row_format(self) -> RowFormat:
        """Returns the settings by which rows are read."""
        return RowFormat(self.content, self.text_field, self.fields)

    def bad_rows(self) -> BadRows:
        """Returns an empty list of bad rows with the limit of this corpus."""
        return BadRows(self.on_bad_row, self.most_bad_rows)

    def documents(self, bad_rows: BadRows | None = None) -> Iterator[Document]:
        """Yields all documents: one for each text file, and one for each row of the other files.

        Args:
            bad_rows: collects the rows that cannot be used. Without it, the first such row raises.

        Raises:
            UsageError: a file or a row cannot be read, or holds no document.
        """
        bad = bad_rows or BadRows("raise")
        row_format, folder = self.row_format(), list_corpus_files(self.path)
        folder.log_left_out("corpus")
        for path in folder.files:
            name = printable(path.relative_to(folder.root))
            for row in read_rows(path, name, lambda columns: columns_to_read(columns, row_format)):
                bad.count_row()
                yield from bad.attempt(row.name, document_from_row, row, row_format)


def split_hash(seed: int, digest: bytes) -> bytes:
    """Returns the hash by which a content is held out: those of the smallest hashes are."""
    return hashlib.sha256(f"{seed} ".encode() + digest).digest()


def split_documents(documents: Sequence[D], share: float, seed: int) -> dict[str, list[D]]:
    """Divides whole documents into `train` and `validation`, by their contents and the seed.

    Neither names nor order matter, and documents of the same content are on the same side. `share` of the distinct
    contents is held out for validation: at least one, never all. So a document's side depends on the others too.

    Raises:
        UsageError: fewer than two different documents, so that one side would be empty.
    """
    contents = {document.digest for document in documents}
    if len(contents) < 2:
        raise UsageError(
            f"the corpus has {len(contents)} different document(s) with something to score; wanted two or more, one "
            "to hold out. A text file, a line of a .jsonl file and a row of a .parquet file are each a document. Text "
            "of less than two tokens and conversations without the assistant's turn are left out."
        )
    if repeated := len(documents) - len(contents):
        log.info("corpus: %d of %d documents repeat the content of another", repeated, len(documents))
    # Hash each distinct content with the seed: the smallest hashes are held out.
    held_out = min(len(contents) - 1, max(1, round(share * len(contents))))
    ranked = sorted(contents, key=lambda digest: split_hash(seed, digest))
    validation = set(ranked[:held_out])
    sides: dict[str, list[D]] = {"train": [], "validation": []}
    for document in documents:
        sides["validation" if document.digest in validation else "train"].append(document)
    return sides
