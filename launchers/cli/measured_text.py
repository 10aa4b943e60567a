"""Text on which commands measure a teacher: records of a cache, or a text file, in rows of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = (256, 128, 64, 32, 16, 8, 4, 2)


def read_rows(teacher: Path, cache: str | None, text: str | None, row_length: int | None, tokens: int) -> "Tensor":
    """Returns rows [B, S] of the first `tokens` of a cache or a text, each row a piece of one document.

    Raises:
        UsageError: not one of `cache` and `text` is given, or it cannot be read.
    """
    from data.stream.plain_rows import cache_documents, plain_rows, text_document
    from kd_core.errors import UsageError

    if (cache is None) == (text is None):
        raise UsageError("wanted either --cache=DIR or --text=FILE.")
    documents = cache_documents(cache, teacher) if cache is not None else [text_document(Path(text or ""), teacher)]
    lengths: Sequence[int] = [row_length] if row_length else LENGTHS
    return plain_rows(documents, lengths, tokens)
