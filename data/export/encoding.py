"""Documents as tokens, with a mask of the labels to score: all of a text, the assistant's of a conversation."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.export.chat import Conversation
from data.export.documents import Document
from data.export.template import ChatTemplate, Span
from data.tokenizer import Pieces, Tokenizer

# What is held as text at a time.
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20
Array = np.ndarray[Any, np.dtype[Any]]


class Encoded(NamedTuple):
    """A document's T + 1 tokens; `loss_mask[t]` says whether label t, which is token t + 1, is scored.

    `digest` is that of the document's content, whatever its name and whoever tokenized it.
    """

    name: str
    token_ids: Array
    loss_mask: Array
    digest: bytes = b""


class _LaidOut(NamedTuple):
    """A document as one text; `spans` are the characters to score (None: all)."""

    name: str
    digest: bytes
    text: str
    spans: list[Span] | None


def _batches(documents: Iterable[_LaidOut]) -> Iterator[list[_LaidOut]]:
    batch: list[_LaidOut] = []
    for document in documents:
        batch.append(document)
        if sum(len(each.text) for each in batch) >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _scored(pieces: Pieces, spans: Sequence[Span]) -> Array:
    """Which tokens have a character in a span."""
    scored = np.zeros(len(pieces.ids), np.uint8)
    starts, ends = np.asarray(pieces.offsets, np.int64).reshape(-1, 2).T
    for start, end in spans:
        scored |= ((starts < end) & (ends > start)).astype(np.uint8)
    return scored


class Encoder:
    """The tokenizer of a folder, and its chat template once a conversation asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer(folder)
        self.template: ChatTemplate | None = None
        self.special_tokens = [token for token in self.tokenizer.special_tokens() if token]
        self.turn_ends = Counter[str]()  # special tokens that end scored turns

    def _laid_out(self, document: Document) -> _LaidOut:
        if not isinstance(document.content, Conversation):
            return _LaidOut(document.name, document.digest(), document.content, None)
        if self.template is None:
            self.template = ChatTemplate.read(self.folder, self.special_tokens)
        text, spans = self.template.render(document.content, document.name)
        for start, end in spans:
            turn = text[start:end].rstrip()
            known = (*self.turn_ends, *self.special_tokens)
            self.turn_ends.update([token for token in known if turn.endswith(token)][:1])
        return _LaidOut(document.name, document.digest(), text, spans)

    def chat_format(self) -> dict[str, Any] | None:
        """Returns how the conversations so far were written: the template, what it names, and what ends turns."""
        if self.template is None:
            return None
        source, ends = self.template.source, [token for token, _ in self.turn_ends.most_common()]
        return {
            "template": source,
            "special_tokens": {name: text for name, text in self.template.special.items() if name in source},
            "turn_ends": {token: ids[0] for token, ids in zip(ends, self.tokenizer.encode(ends), strict=True)},
        }

    def _encoded(self, batch: Sequence[_LaidOut]) -> Iterator[Encoded]:
        """Offsets, which take far more room than ids, only where there are spans."""
        texts = [each.text for each in batch if each.spans is None]
        plain = iter(self.tokenizer.encode(texts))
        chats = iter(self.tokenizer.encode_with_offsets([each.text for each in batch if each.spans is not None]))
        for each in batch:
            if each.spans is None:
                ids = np.asarray(next(plain), np.int32)
                scored = np.ones(len(ids), np.uint8)
            else:
                pieces = next(chats)
                ids, scored = np.asarray(pieces.ids, np.int32), _scored(pieces, each.spans)
            yield Encoded(each.name, ids, scored[1:], each.digest)

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Each document, in order; a few are text at a time.

        Raises:
            UsageError: there is no chat template for a conversation, or it cannot render it.
        """
        for batch in _batches(self._laid_out(document) for document in documents):
            yield from self._encoded(batch)
