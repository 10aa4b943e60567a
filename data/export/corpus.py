"""Documents out of text files and JSONL; their split into train and validation; their windows."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from kd_core.files import content_fingerprint


class Document(NamedTuple):
    """A name that stays the same between exports, and the text."""

    name: str
    text: str


class Window(NamedTuple):
    """A run of a document's tokens: T inputs and one more, the last label."""

    document: str
    start: int
    token_ids: list[int]


@dataclass(frozen=True)
class Corpus:
    """Text files, JSONL files (one object a line, the text in `text_field`), or folders of both."""

    path: str
    text_field: str = "text"

    def files(self) -> list[Path]:
        """All files of the corpus, in a stable order.

        Raises:
            UsageError: there is none.
        """
        root = Path(self.path)
        if root.is_file():
            return [root]
        files = sorted(path for path in root.rglob("*") if path.suffix in {".txt", ".jsonl"} and path.is_file())
        if not files:
            state = "has no .txt or .jsonl file" if root.is_dir() else "does not exist"
            raise UsageError(f"corpus {self.path}: {state}. Name a folder of them, or one such file.")
        return files

    def fingerprint(self) -> str:
        """sha256 over names and bytes of all files."""
        return content_fingerprint(self.files())

    def documents(self) -> Iterator[Document]:
        """All documents; each text file is one, and each line of a JSONL file.

        Raises:
            UsageError: a file is not UTF-8, a line not JSON, or without the text field.
        """
        root = Path(self.path)
        for path in self.files():
            name = path.name if path == root else str(path.relative_to(root))
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
            if path.suffix == ".jsonl":
                yield from self._lines(path, name, text)
            else:
                yield Document(name, text)

    def _lines(self, path: Path, name: str, text: str) -> Iterator[Document]:
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)[self.text_field]
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}:{number}: not JSON ({error.msg}).") from None
            except (KeyError, TypeError):
                raise UsageError(f"{path}:{number}: no field {self.text_field!r} (corpus.text_field).") from None
            if not isinstance(value, str):
                raise UsageError(f"{path}:{number}: {self.text_field!r} is a {type(value).__name__}, wanted text.")
            yield Document(f"{name}:{number}", value)


def split_documents(documents: Sequence[Document], share: float, seed: int) -> dict[str, list[Document]]:
    """Whole documents to `train` and `validation`; a document's side depends on its name, the seed and the others.

    Raises:
        UsageError: fewer than two documents, so that one side would be empty.
    """
    if len(documents) < 2:
        raise UsageError(
            f"the corpus has {len(documents)} document(s) of at least two tokens; wanted two or more, one to hold out. "
            "Each .txt file and each line of a .jsonl file is a document."
        )
    held_out = min(len(documents) - 1, max(1, round(share * len(documents))))
    ranked = sorted(documents, key=lambda d: hashlib.sha256(f"{seed} {d.name}".encode()).digest())
    validation = {document.name for document in ranked[:held_out]}
    sides: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in documents:
        sides["validation" if document.name in validation else "train"].append(document)
    return sides


def windows_of(documents: Sequence[Document], tokenizer: Tokenizer, row_length: int) -> Iterator[Window]:
    """Each document's tokens in runs of at most `row_length` positions; neighbours share one token, scored once."""
    for document, ids in zip(documents, tokenizer.encode([d.text for d in documents]), strict=True):
        for start in range(0, len(ids) - 1, row_length):
            yield Window(document.name, start, ids[start : start + row_length + 1])


def choose_windows(windows: Sequence[Window], tokens: int | None, seed: int) -> list[Window]:
    """Windows drawn without replacement while they fit into `tokens` positions (None: all), in corpus order."""
    if tokens is None:
        return list(windows)
    chosen: list[int] = []
    left = tokens
    for index in np.random.default_rng(seed).permutation(len(windows)).tolist():
        size = len(windows[index].token_ids) - 1
        if size <= left:
            chosen.append(index)
            left -= size
        if left <= 0:
            break
    return [windows[index] for index in sorted(chosen)]
