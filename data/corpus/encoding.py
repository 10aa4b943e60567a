"""Documents as tokens, with a mask of the scored labels: all of a text, the assistant's of a conversation.

A plain text gets the tokenizer's BOS in front and its EOS behind, where the tokenizer adds them or the corpus asks for
them. The EOS is a label, the BOS is not. A conversation gets neither, since its template writes them.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.corpus.bad_rows import BadRows
from data.corpus.chat.chat_template import ChatTemplate, NoTemplateError, Span
from data.corpus.chat.conversations import Conversation, PlainPrompt
from data.corpus.documents import Document
from data.corpus.token_rows import TokenRow
from data.text_lines import BadRowError
from data.tokenizer import AddToken, EncodedText, SurroundingIds, Tokenizer
from kd_core.errors import UsageError

log = logging.getLogger("kd")
# The most documents and characters that are held as text at a time.
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20
Array = np.ndarray[Any, np.dtype[Any]]


class Encoded(NamedTuple):
    """The T + 1 tokens of a document. `loss_mask[t]` is 1 where label t, which is token t + 1, is scored.

    `digest` is that of the document's content. It depends on neither its name nor the tokenizer. `context` has the
    tokens that the teacher reads in place of those before the first scored label, if there are such.
    """

    name: str
    token_ids: Array
    loss_mask: Array
    digest: bytes = b""
    context: Array | None = None


class _DocumentText(NamedTuple):
    """A document as one text. `spans` are the characters to score, or None for all of them.

    `is_plain` marks a text that no chat template wrote. `ids` are tokens in place of a text. `teacher` is what the
    teacher reads, if that is something else.
    """

    name: str
    digest: bytes
    text: str
    spans: list[Span] | None
    is_plain: bool
    ids: TokenRow | None = None
    teacher: "_DocumentText | None" = None

    @property
    def size(self) -> int:
        """Returns how much of a batch it takes, in characters."""
        return (
            len(self.text)
            + (4 * len(self.ids.token_ids) if self.ids else 0)
            + (self.teacher.size if self.teacher else 0)
        )


def _batches(documents: Iterable[_DocumentText]) -> Iterator[list[_DocumentText]]:
    batch: list[_DocumentText] = []
    for document in documents:
        batch.append(document)
        if sum(document.size for document in batch) >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _scored_tokens(pieces: EncodedText, spans: Sequence[Span]) -> Array:
    """Returns a mask of the tokens that have a character in a span."""
    scored = np.zeros(len(pieces.ids), np.uint8)
    starts, ends = np.asarray(pieces.offsets, np.int64).reshape(-1, 2).T
    for start, end in spans:
        scored |= ((starts < end) & (ends > start)).astype(np.uint8)
    return scored


def _with_context(student: Encoded, teacher: Encoded) -> Encoded:
    """Returns the student's tokens with those that the teacher reads before the completion.

    Raises:
        BadRowError: the two do not score the same tokens.
    """
    if not student.loss_mask.any():
        return student
    # The first scored label of each. From there on, tokens and mask must be the same.
    begin, teacher_begin = int(student.loss_mask.argmax()), int(teacher.loss_mask.argmax())
    same_ids = np.array_equal(student.token_ids[begin + 1 :], teacher.token_ids[teacher_begin + 1 :])
    if not same_ids or not np.array_equal(student.loss_mask[begin:], teacher.loss_mask[teacher_begin:]):
        message = (
            f"{student.name}: the completion has other tokens behind 'teacher_prompt' than behind the prompt, as where "
            "a token straddles the two. End both prompts alike, as with white space, or drop the row."
        )
        raise BadRowError(message, "a completion of other tokens behind teacher_prompt")
    return student._replace(context=teacher.token_ids[: teacher_begin + 1])


class Encoder:
    """The tokenizer of a folder, and its chat template once a conversation needs it.

    `used` has the tokens put around texts, once there was a text. `doubled` counts texts that began with them already.
    """

    def __init__(self, folder: Path, bos: AddToken = "auto", eos: AddToken = "auto") -> None:
        self.folder = folder
        self.tokenizer = Tokenizer(folder)
        self.template: ChatTemplate | None = None
        self.joins_prompts = False
        self.around = self.tokenizer.around(bos, eos)
        self.used: SurroundingIds | None = None
        self.doubled = 0
        self.special_tokens = [token for token in self.tokenizer.special_tokens() if token]
        self.turn_ends = Counter[str]()  # how many scored turns each special token ends

    def describe(self) -> str:
        """Returns in words which tokens were put around texts, or nothing where there was no text."""
        return self.tokenizer.describe(self.used) if self.used else ""

    def _as_text(self, document: Document) -> _DocumentText:
        text = self._content_text(document)
        if document.teacher_content is None:
            return text
        teacher = document._replace(content=document.teacher_content, teacher_content=None)
        return text._replace(teacher=self._content_text(teacher))

    def _check_tokens(self, row: TokenRow, document: Document) -> None:
        """Raises BadRowError for ids beyond the vocabulary, and for those of another tokenizer."""
        where = document.where or document.name
        if (largest := max(row.token_ids)) >= self.tokenizer.vocab_size:
            message = f"{where}: has the id {largest}; the teacher's vocabulary has {self.tokenizer.vocab_size} tokens."
            raise BadRowError(f"{message} Tokenise it with the teacher's tokenizer.", "an id beyond the vocabulary")
        if row.tokenizer not in (None, self.fingerprint):
            message = f"{where}: its 'tokenizer' is {row.tokenizer!a:.80}; that of the teacher is {self.fingerprint}."
            raise BadRowError(f"{message} Tokenise it with the teacher's tokenizer.", "ids of another tokenizer")

    @cached_property
    def fingerprint(self) -> str:
        """Returns the fingerprint of the tokenizer."""
        return self.tokenizer.fingerprint()

    def _content_text(self, document: Document) -> _DocumentText:
        if isinstance(document.content, TokenRow):
            self._check_tokens(document.content, document)
            return _DocumentText(document.name, document.digest(), "", None, is_plain=False, ids=document.content)
        if not isinstance(document.content, Conversation):
            return _DocumentText(document.name, document.digest(), document.content, None, is_plain=True)
        is_plain = isinstance(document.content, PlainPrompt)
        if self.template is None and not (is_plain and self.joins_prompts):
            self.read_template(is_plain)
        if self.template is None:  # a plain prompt and its completion become one text
            prompt, completion = (str(message["content"]) for message in document.content.messages)
            scored = (len(prompt), len(prompt) + len(completion))
            return _DocumentText(document.name, document.digest(), prompt + completion, [scored], is_plain=True)
        text, spans = self.template.render(document.content, document.where or document.name)
        for start, end in spans:
            turn = text[start:end].rstrip()
            # Tokens that ended earlier turns come first.
            candidates = (*self.turn_ends, *self.special_tokens)
            self.turn_ends.update([token for token in candidates if turn.endswith(token)][:1])
        return _DocumentText(document.name, document.digest(), text, spans, is_plain=False)

    def expect_everything(self) -> None:
        """Counts with texts and conversations, also with tools, as a long corpus may hold anywhere."""
        self.used = self.around
        with contextlib.suppress(NoTemplateError):
            self.read_template(is_plain=False)
        if self.template:
            self.template.used_for_tools = True

    def read_template(self, is_plain: bool) -> None:
        """Reads the chat template. Only prompts and completions of plain text can do without one.

        Raises:
            NoTemplateError: there is none, and the document needs it.
        """
        try:
            self.template = ChatTemplate.read(self.folder, self.special_tokens)
        except NoTemplateError:
            if not is_plain:
                raise
            self.joins_prompts = True
            log.info("%s: no chat template, so a completion follows its prompt directly, as one text", self.folder)

    def chat_format(self) -> dict[str, Any] | None:
        """Returns the templates of the conversations so far, their special tokens, and the tokens that ended turns.

        The template of conversations with tools is part of it wherever the teacher has one.
        """
        if self.template is None:
            return None
        for_tools, ends = self.template.for_tools, [token for token, _ in self.turn_ends.most_common()]
        templates = {"template": self.template.source} | ({"tool_use": for_tools.source} if for_tools else {})
        special = self.template.special.items()
        return {
            **templates,
            "special_tokens": {name: text for name, text in special if any(name in t for t in templates.values())},
            "turn_ends": {token: ids[0] for token, ids in zip(ends, self.tokenizer.encode(ends), strict=True)},
        }

    def _encode_batch(self, batch: Sequence[_DocumentText]) -> Iterator[Encoded]:
        encoded = self._encode_texts([text for document in batch for text in (document, document.teacher) if text])
        for document in batch:
            student = next(encoded)
            yield _with_context(student, next(encoded)) if document.teacher else student

    def _encode_texts(self, batch: Sequence[_DocumentText]) -> Iterator[Encoded]:
        # Offsets take far more room than ids, so only documents with spans are encoded with them.
        texts = [document.text for document in batch if document.spans is None and not document.ids]
        plain = iter(self.tokenizer.encode(texts))
        chats = iter(
            self.tokenizer.encode_with_offsets([document.text for document in batch if document.spans is not None])
        )
        for document in batch:
            if document.ids:
                ids, scored = np.asarray(document.ids.token_ids, np.int32), np.asarray(document.ids.loss_mask, np.uint8)
            elif document.spans is None:
                ids = np.asarray(next(plain), np.int32)
                scored = np.ones(len(ids), np.uint8)
            else:
                pieces = next(chats)
                ids, scored = np.asarray(pieces.ids, np.int32), _scored_tokens(pieces, document.spans)
            if document.is_plain and len(ids):
                ids, scored = self._with_bos_and_eos(ids, scored)
            yield Encoded(document.name, ids, scored[1:], document.digest)

    def _with_bos_and_eos(self, ids: Array, scored: Array) -> tuple[Array, Array]:
        """Puts the BOS and EOS around the ids of a plain text, and extends the mask of scored tokens.

        The BOS is not scored. The EOS is scored where the last token is.
        """
        begins, ends = self.used = self.around
        self.doubled += bool(begins) and ids[: len(begins)].tolist() == begins
        scored = np.concatenate([np.zeros(len(begins), np.uint8), scored, scored[-1:].repeat(len(ends))])
        return np.concatenate([begins, ids, ends]).astype(np.int32), scored

    def encode(self, documents: Iterable[Document], bad_rows: BadRows | None = None) -> Iterator[Encoded]:
        """Yields the documents as tokens, in order. Only one batch at a time is held as text.

        Args:
            bad_rows: collects the documents that cannot be encoded. Without it, the first such document raises.

        Raises:
            UsageError: a conversation has no chat template, or one that cannot render it.
        """
        bad = bad_rows or BadRows("raise")
        texts = (text for d in documents for text in bad.attempt(d.name, self._as_text, d))
        for batch in _batches(texts):
            if not bad.will_stop:
                yield from self._encode_or_skip(batch, bad)

    def _encode_or_skip(self, batch: Sequence[_DocumentText], bad_rows: BadRows) -> list[Encoded]:
        """Returns a batch as tokens, without documents on which the tokenizer fails: `bad_rows` collects those."""
        try:
            return list(self._encode_batch(batch))
        except UsageError as error:
            if len(batch) > 1:
                return [encoded for document in batch for encoded in self._encode_or_skip([document], bad_rows)]
            is_bad = isinstance(error, BadRowError)
            named = error if is_bad else BadRowError(f"{batch[0].name}: {error}", "the tokenizer fails")
            bad_rows.add(batch[0].name, named)
            return []
