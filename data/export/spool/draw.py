"""Split and draw of an export's windows: exact where a corpus is short, by thresholds of hashes where it is long.

A short corpus is tokenised before anything is scored. Its split holds out an exact share of the contents, and its draw
fills `train_tokens` as far as windows go. A long one is decided document by document, as it is read:

    split    validation where hash(seed, content) < validation_share · 2⁶⁴: contents that an exact split takes first
    draw     a window is taken where hash(seed, content, start) < rate · 2⁶⁴, until its split has its tokens

The rate is the tokens that are wanted over an estimate of those there are. It is the same on every rank and at every
start.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from data.cache.contents import CachedDocuments, prompt_digest, window_digest
from data.corpus.chat.conversations import Conversation
from data.corpus.corpus import split_documents, split_hash
from data.corpus.documents import Document
from data.corpus.encoding import Encoded
from data.corpus.windows import Window, choose_windows, cut_windows
from data.export.spool.spool_parts import SPLITS
from kd_core.errors import UsageError

if TYPE_CHECKING:
    from data.export.teacher_export import TeacherExport

log = logging.getLogger("kd")
MOST_AROUND, MOST_TEMPLATE = 16, 4096  # tokens around a text, and of a template around a conversation


class Drawn(NamedTuple):
    """Windows of one cache, and the number of positions that they were drawn from."""

    windows: list[Window]
    drawn_from: int


def digests(windows: Iterable[Window]) -> Iterator[bytes]:
    """Yields the digest of each window, as its record in a cache has it."""
    return (window_digest(window.start, window.token_ids) for window in windows)


def cut(export: "TeacherExport", documents: Iterable[Encoded]) -> Iterator[Window]:
    """Yields the windows of documents."""
    return cut_windows(documents, export.row_length, export.overlap)


def _missing(cached: CachedDocuments, windows: Iterable[Window]) -> list[Window]:
    """Returns the windows that no cache holds behind the same prompt of the teacher."""
    return [w for w in windows if not cached.caches_with_any(digests([w]), prompt_digest(w.context))]


def _by_split(
    export: "TeacherExport", documents: list[Encoded], cached: CachedDocuments | None
) -> dict[str, list[Encoded]]:
    """Returns the documents by split. In an extension, a document goes to the cache that already has windows of it."""
    if cached is None:
        return split_documents(documents, export.validation_share, export.seed)
    continued: dict[str, list[Encoded]] = {split: [] for split in SPLITS}
    unseen: list[Encoded] = []
    for document in documents:
        caches = cached.caches_with_any(digests(cut(export, [document])))
        (continued[min(caches)] if caches else unseen).append(document)  # windows in both caches: to "train"
    if len(unseen) < 2:  # too few to split
        return {**continued, "train": continued["train"] + unseen}
    unseen_by_split = split_documents(unseen, export.validation_share, export.seed)
    return {split: continued[split] + unseen_by_split[split] for split in SPLITS}


def draw_exactly(export: "TeacherExport", documents: list[Encoded], cached: CachedDocuments | None) -> dict[str, Drawn]:
    """Splits a short corpus and draws its windows, of all at once.

    Raises:
        UsageError: no window is left for one of the caches of a new export.
    """
    by_split, drawn = _by_split(export, documents, cached), dict[str, Drawn]()
    for split, tokens in wanted_tokens(export).items():
        windows = list(cut(export, by_split[split]))
        if cached is not None:
            windows = _missing(cached, windows)
        chosen = choose_windows(windows, tokens, export.seed)
        if not chosen and cached is None:
            raise no_window(export, split)
        drawn[split] = Drawn(chosen, sum(window.positions for window in windows))
    return drawn


def wanted_tokens(export: "TeacherExport") -> dict[str, int | None]:
    """Returns how many positions each cache may have, or None for all of its split."""
    return dict(zip(SPLITS, (export.train_tokens, export.validation_tokens), strict=True))


def no_window(export: "TeacherExport", split: str) -> UsageError:
    """Returns the error of a cache without windows."""
    return UsageError(
        f"corpus {export.corpus.path}: the {split} split has no window of two tokens or more within "
        f"{wanted_tokens(export)[split]} tokens. Give more text, or a larger {split}_tokens."
    )


@dataclass(frozen=True)
class StreamDraw:
    """Rules by which each document of a long corpus is split, and each of its windows is taken or not."""

    seed: int
    validation_share: float
    rates: dict[str, float]  # the share of the windows of each split that is taken
    step: int  # positions between the starts of neighbouring windows

    @classmethod
    def from_estimates(cls, export: "TeacherExport", estimates: dict[str, int]) -> "StreamDraw":
        """Returns the rules for a corpus of about so many positions in each split."""
        rates = {
            split: 1.0 if tokens is None else min(1.0, tokens / max(1, estimates[split]))
            for split, tokens in wanted_tokens(export).items()
        }
        return cls(export.seed, export.validation_share, rates, export.row_length - export.overlap)

    def split(self, digest: bytes) -> str:
        """Returns the split of a document by the digest of its content."""
        return SPLITS[_fraction(split_hash(self.seed, digest)) < self.validation_share]

    def takes(self, split: str, digest: bytes, start: int) -> bool:
        """Returns whether a document's window at `start` is taken."""
        rate = self.rates[split]
        return rate >= 1 or _fraction(hashlib.sha256(f"{self.seed} {start} ".encode() + digest).digest()) < rate

    def may_take(self, document: Document) -> bool:
        """Returns False where no window of a document can be taken, so that it need not be tokenised.

        A text has at most as many tokens as bytes, and a few around it. What a template adds is bounded generously.
        """
        digest = document.digest()
        split, content = self.split(digest), document.content
        if self.rates[split] >= 1 or not isinstance(content, (str, Conversation)):
            return True
        size = len(str(content).encode(errors="replace"))
        most = size + MOST_AROUND if isinstance(content, str) else 2 * size + MOST_TEMPLATE
        return any(self.takes(split, digest, start) for start in range(0, most, self.step))


def _fraction(payload: bytes) -> float:
    """Returns the first 64 bits of a hash as a number in [0, 1)."""
    return int.from_bytes(payload[:8], "big") / 2**64


class StreamedDraw:
    """Decides of documents one after the other. Holds nothing of them but, in an extension, a table on disk."""

    def __init__(
        self, export: "TeacherExport", rules: StreamDraw, cached: CachedDocuments | None, taken: dict[str, int]
    ) -> None:
        self.export, self.rules, self.cached, self.taken = export, rules, cached, taken

    def windows(self, document: Encoded) -> tuple[str, list[Window], int]:
        """Returns the split of a document, its windows to score, and the positions that they were drawn from."""
        windows = list(cut(self.export, [document]))
        split = self.rules.split(document.digest)
        if self.cached is not None:
            if caches := self.cached.caches_with_any(digests(windows)):
                split = min(caches)
            windows = _missing(self.cached, windows)
        tokens, chosen = wanted_tokens(self.export)[split], list[Window]()
        for window in windows:
            fits = tokens is None or self.taken[split] + window.positions <= tokens
            if fits and self.rules.takes(split, document.digest, window.start):
                self.taken[split] += window.positions
                chosen.append(window)
        return split, chosen, sum(window.positions for window in windows)


class NewDocuments:
    """The documents of a corpus that the caches do not hold, each content once, and counts of them for the log."""

    def __init__(self, export: "TeacherExport", cached: CachedDocuments) -> None:
        self.export, self.cached = export, cached
        self.all = self.new = self.renewed = 0
        self.names: list[str] = []  # the first few that were renewed

    def keep(self, documents: Iterable[Encoded]) -> Iterator[Encoded]:
        """Yields the documents that are new."""
        for document in documents:
            self.all += 1
            prompt = prompt_digest(document.context)
            is_there = self.cached.hold(digests(cut(self.export, [document])), prompt)
            if is_there or not self.cached.remember(document.digest + prompt.encode()):
                continue
            self.new += 1
            if self.cached.has_name(document.name):
                self.renewed += 1
                self.names = [*self.names, document.name][:3]
            yield document

    def log(self) -> None:
        """Logs how many documents are new, and how many of them have other content under a name of the cache."""
        path = self.export.corpus.path
        log.info("corpus %s: %d of %d documents are new", path, self.new, self.all)
        if self.renewed:
            log.warning(
                "corpus %s: %d of the new documents have the names of documents in the cache whose content differs, "
                "and which stay there (%s%s)",
                path, self.renewed, ", ".join(self.names), " …" if self.renewed > 3 else "",
            )  # fmt: skip


def largest_token(windows: Sequence[Window]) -> int:
    """Returns the largest id of windows, or −1 without any."""
    ids = itertools.chain.from_iterable(
        (w.token_ids,) if w.context is None else (w.token_ids, w.context) for w in windows
    )
    return max((int(array.max(initial=-1)) for array in ids), default=-1)
