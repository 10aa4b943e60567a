"""Batches of corpus rows to documents as tokens, in this process or another: nothing here holds the corpus.

files ──row_batches──► rows with the place behind them ──RowEncoder──► documents as tokens, rows that are bad
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.corpus.bad_rows import BadRow, BadRows
from data.corpus.corpus import Corpus
from data.corpus.corpus_files import list_corpus_files
from data.corpus.documents import Document, document_from_row
from data.corpus.encoding import BATCH_CHARACTERS, BATCH_DOCUMENTS, Encoded, Encoder
from data.corpus.file_rows import Row, read_rows
from data.corpus.row_layouts import columns_to_read
from kd_core.files import printable


class Place(NamedTuple):
    """A place in a corpus: so many rows of this file, and all files before it, have been read."""

    file: int = 0
    row: int = 0


class RowBatch(NamedTuple):
    """Neighbouring rows of one file, with about how many bytes they take there, and the place behind them."""

    rows: list[Row]
    bytes: int
    behind: Place


def _row_bytes(row: Row) -> int:
    """Returns about how many bytes a row takes in a file."""
    value = row.value
    if isinstance(value, dict):
        return len(json.dumps(value, ensure_ascii=False, default=str).encode(errors="replace"))
    return len(value.encode()) if isinstance(value, str) else 0


def row_batches(corpus: Corpus, start: Place = Place()) -> Iterator[RowBatch]:  # noqa: B008 (it is immutable)
    """Yields the rows of a corpus from a place on, a few at a time.

    Raises:
        UsageError: a file cannot be read.
    """
    folder, row_format = list_corpus_files(corpus.path), corpus.row_format()
    folder.log_left_out("corpus")
    for number, path in enumerate(folder.files[start.file :], start.file):
        batch, size, read = list[Row](), 0, 0
        name = printable(path.relative_to(folder.root))
        for row in read_rows(path, name, lambda columns: columns_to_read(columns, row_format)):
            read += 1
            if number == start.file and read <= start.row:
                continue
            batch.append(row)
            size += _row_bytes(row)
            if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
                yield RowBatch(batch, size, Place(number, read))
                batch, size = [], 0
        yield RowBatch(batch, size, Place(number + 1, 0))


@dataclass
class EncodingFacts:
    """Facts about documents that were encoded: what was put around texts, and which tokens ended turns."""

    has_texts: bool = False
    doubled: int = 0
    has_chats: bool = False
    has_tools: bool = False
    turn_ends: Counter[str] = field(default_factory=Counter[str])

    def add(self, other: "EncodingFacts") -> None:
        """Adds the facts of further documents."""
        self.has_texts |= other.has_texts
        self.has_chats |= other.has_chats
        self.has_tools |= other.has_tools
        self.doubled += other.doubled
        self.turn_ends.update(other.turn_ends)

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as JSON values."""
        return {**vars(self), "turn_ends": list(self.turn_ends.items())}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "EncodingFacts":
        """Returns the facts that `to_json` has given."""
        turn_ends: Counter[str] = Counter(dict(value["turn_ends"]))
        return replace(cls(**value), turn_ends=turn_ends)


class EncodedRows(NamedTuple):
    """Documents of a batch of rows as tokens, in order, and its rows that cannot be used.

    `left_out` counts documents with nothing to score.
    """

    rows: int
    bytes: int
    behind: Place
    documents: list[Encoded]
    left_out: int
    bad: list[BadRow]
    facts: EncodingFacts


class DocumentFilter(Protocol):
    """A choice of documents by their content alone, made before they are tokenised."""

    def may_take(self, document: Document) -> bool:
        """Returns False for a document of which nothing will be used."""
        ...


@dataclass(frozen=True)
class RowEncoder:
    """Encodes batches of rows with the tokenizer of a folder. It loads that where it runs, once."""

    folder: Path
    corpus: Corpus
    chosen: DocumentFilter | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RowEncoder, (self.folder, self.corpus, self.chosen)

    @cached_property
    def encoder(self) -> Encoder:
        """Returns the tokenizer, with the template that its documents needed so far."""
        return Encoder(self.folder, self.corpus.bos, self.corpus.eos)

    def _documents(self, batch: RowBatch, bad_rows: BadRows) -> Iterator[Document]:
        for row in batch.rows:
            for document in bad_rows.attempt(row.name, document_from_row, row, self.corpus.row_format()):
                if self.chosen is None or self.chosen.may_take(document):
                    yield document

    def encode(self, batch: RowBatch) -> EncodedRows:
        """Returns the documents of a batch as tokens.

        Raises:
            UsageError: a conversation has no chat template, or one that cannot render it.
        """
        encoder, bad_rows = self.encoder, BadRows("skip", len(batch.rows))
        encoder.used, encoder.doubled, encoder.turn_ends = None, 0, Counter()
        documents = list(encoder.encode(self._documents(batch, bad_rows), bad_rows))
        scored = [document for document in documents if document.loss_mask.any()]
        has_tools = encoder.template is not None and encoder.template.used_for_tools
        chats = encoder.template is not None, has_tools, encoder.turn_ends
        facts = EncodingFacts(encoder.used is not None, encoder.doubled, *chats)
        left_out = len(documents) - len(scored)
        return EncodedRows(len(batch.rows), batch.bytes, batch.behind, scored, left_out, bad_rows.bad, facts)
