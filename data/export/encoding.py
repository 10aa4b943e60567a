"""Documents as tokens, with a mask of the labels to score: all of a text, the assistant's of a conversation."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.export.chat import Conversation
from data.export.documents import Document
from data.export.template import ChatTemplate, Span
from data.tokenizer import Pieces, Tokenizer

BATCH = 256  # documents that are held as text at a time
Array = np.ndarray[Any, np.dtype[Any]]


class Encoded(NamedTuple):
    """A document's T + 1 tokens; `loss_mask[t]` says whether label t, which is token t + 1, is scored."""

    name: str
    token_ids: Array
    loss_mask: Array


def _encoded(name: str, pieces: Pieces, spans: Sequence[Span] | None) -> Encoded:
    """A token is scored when a character of it lies in a span (None: everywhere)."""
    ids = np.asarray(pieces.ids, np.int32)
    scored = np.full(len(ids), spans is None, np.uint8)
    starts, ends = np.asarray(pieces.offsets, np.int64).reshape(-1, 2).T
    for start, end in spans or ():
        scored |= ((starts < end) & (ends > start)).astype(np.uint8)
    return Encoded(name, ids, scored[1:])


class Encoder:
    """The tokenizer of a folder, and its chat template once a conversation asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer(folder)
        self.template: ChatTemplate | None = None

    def _laid_out(self, document: Document) -> tuple[str, list[Span] | None]:
        if not isinstance(document.content, Conversation):
            return document.content, None
        if self.template is None:
            self.template = ChatTemplate.read(self.folder, self.tokenizer.special_tokens())
        return self.template.render(document.content, document.name)

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Each document, in order; a few are text at a time.

        Raises:
            UsageError: there is no chat template for a conversation, or it cannot render it.
        """
        rest = iter(documents)
        while some := list(islice(rest, BATCH)):
            laid_out = [self._laid_out(document) for document in some]
            pieces = self.tokenizer.encode_with_offsets([text for text, _ in laid_out])
            for document, found, (_, spans) in zip(some, pieces, laid_out, strict=True):
                yield _encoded(document.name, found, spans)
