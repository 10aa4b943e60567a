"""Rows of plain tokens without a teacher's entries, of a cache's documents or of a text."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from data.cache.manifest import read_manifest
from data.stream.shards import ShardReader
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError


def cache_documents(folder: Path | str, teacher: Path) -> Iterator[list[int]]:
    """Yields the tokens of a cache's records.

    Raises:
        UsageError: the cache was made with another tokenizer than the teacher's.
    """
    manifest, tokenizer = read_manifest(folder), Tokenizer(teacher)
    if manifest.tokenizer != tokenizer.fingerprint_like(manifest.tokenizer):
        raise UsageError(f"{folder}: was made with another tokenizer than that of {teacher}. Name its own teacher.")
    for record in ShardReader(folder, manifest).records():
        yield record.token_ids.tolist()


def text_document(path: Path, teacher: Path) -> list[int]:
    """Returns the tokens of a text file, begun as the teacher's tokenizer begins texts.

    Raises:
        UsageError: the file is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error}).") from None
    tokenizer = Tokenizer(teacher)
    return [*tokenizer.around().begins, *tokenizer.encode([text])[0]]


def plain_rows(documents: Iterable[list[int]], lengths: Sequence[int], tokens: int) -> Int[Tensor, "B S"]:
    """Cuts documents into rows of one of the lengths, each row a piece of one document.

    The length is the longest of which there are rows for so many tokens, or else the one that holds the most.

    Raises:
        UsageError: no document is as long as a row.
    """
    rows: dict[int, list[list[int]]] = {length: [] for length in lengths}
    for document in documents:
        for length, rows_of_length in rows.items():
            if len(rows_of_length) * length < tokens:
                rows_of_length += [document[i : i + length] for i in range(0, len(document) - length + 1, length)]
        if len(rows[max(rows)]) * max(rows) >= tokens:
            break
    length = max(rows, key=lambda length: (min(tokens, len(rows[length]) * length), length))
    if not rows[length]:
        raise UsageError(f"no document of the text has {length} tokens. Lower the length of the rows (--row_length).")
    return torch.tensor(rows[length][: max(1, tokens // length)])
