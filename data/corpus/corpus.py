"""A corpus: files of documents, in a stable order; the documents' split into train and validation."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

from data.corpus.bad_rows import BadRows, OnBadRow
from data.corpus.corpus_files import corpus_files
from data.corpus.documents import Document, document_of
from data.corpus.file_rows import rows_of
from data.corpus.row_layouts import LAYOUTS, Reading, check_fields, columns_to_read
from data.tokenizer import Choice
from kd_core.errors import UsageError
from kd_core.files import content_fingerprint, printable
from kd_core.ranges import NOT_NEGATIVE, check_ranges

log = logging.getLogger("kd")


class Known(Protocol):
    """Anything that is known by its content and can be split."""

    @property
    def digest(self) -> bytes:
        """Of the document's content."""
        ...


D = TypeVar("D", bound=Known)


@dataclass(frozen=True)
class Corpus:
    """A file, a folder or a data set of the hub: texts, and rows of JSON, CSV, Parquet and Arrow, also mixed.

    Args:
        path: a file, a folder, or `hub:OWNER/NAME[@REVISION][:FOLDER_OR_PATTERN]`.
        text_field: the field of a row that is a text.
        content: the layout of rows (`data/corpus/row_layouts.py`), where they have several.
        fields: instead of these two, other names of fields, such as {"prompt": "question", "completion": "answer"},
            {"messages": "dialogue", "role": "speaker", "content": "utterance"} or {"text": "body"}; also "system".
        on_bad_row: stop with one message at a row that cannot be used, or skip it.
        most_bad_rows: the most rows that may be skipped: below 1 a share of all, rounded up; from 1 on a number.
        bos, eos: whether a text begins with the tokenizer's BOS and ends with its EOS (auto: as the tokenizer itself
            adds them). What comes of it stands in the plan, and is no part of the corpus.
    """

    path: str
    text_field: str = "text"
    content: str = "auto"
    fields: dict[str, str] | None = None
    on_bad_row: OnBadRow = "stop"
    most_bad_rows: float = 0.01
    bos: Choice = "auto"
    eos: Choice = "auto"

    def __post_init__(self) -> None:
        if self.content not in (contents := ("auto", *LAYOUTS)):
            raise UsageError(f"corpus.content: got {self.content!r}; wanted one of {', '.join(contents)}.")
        if self.on_bad_row not in get_args(OnBadRow):
            raise UsageError(f"corpus.on_bad_row: got {self.on_bad_row!r}; wanted one of stop, skip.")
        check_ranges(self, "corpus.", most_bad_rows=NOT_NEGATIVE)
        if self.fields is not None:
            self._check_fields(self.fields)

    def _check_fields(self, mapping: dict[str, str]) -> None:
        try:
            check_fields(mapping)
        except ValueError as error:
            raise UsageError(f"corpus.fields: got {mapping}; {error}.") from None
        # Nothing would read the others beside a mapping.
        others = {"content": (self.content, "auto"), "text_field": (self.text_field, "text")}
        for name, (value, default) in others.items():
            if value != default:
                raise UsageError(
                    f"corpus.fields and corpus.{name}: got {mapping} and {value!r}; wanted one of them, for each says "
                    "how rows are read. Leave one out."
                )

    def files(self) -> list[Path]:
        """All files of the corpus, in a stable order.

        Raises:
            UsageError: there is none, or one cannot be reached.
        """
        return corpus_files(self.path).files

    def identity(self) -> dict[str, Any]:
        """What makes the corpus this one and no other: names and bytes of all files, and how they are read."""
        fields = {"fields": dict(self.fields)} if self.fields else {}
        return {
            "fingerprint": content_fingerprint(self.files()),
            "text_field": self.text_field,
            "content": self.content,
            **fields,
        }

    def bad_rows(self) -> BadRows:
        """Returns an empty list of bad rows with the limit of this corpus."""
        return BadRows(self.on_bad_row, self.most_bad_rows)

    def documents(self, bad_rows: BadRows | None = None) -> Iterator[Document]:
        """Yields all documents: each text file, each row of the others.

        Args:
            bad_rows: takes the rows that cannot be used; without, the first of them is raised.

        Raises:
            UsageError: a file or a row cannot be read, or holds no document.
        """
        bad = bad_rows or BadRows("raise")
        reading, found = Reading(self.content, self.text_field, self.fields), corpus_files(self.path)
        found.log_left_out("corpus")
        for path in found.files:
            name = printable(path.relative_to(found.root))
            for row in rows_of(path, name, lambda columns: columns_to_read(columns, reading)):
                bad.count_row()
                yield from bad.attempt(row.name, document_of, row, reading)


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
            "to hold out. A text file, a line of a .jsonl file and a row of a .parquet file are each a document. Text "
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
