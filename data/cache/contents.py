"""Digests of windows, and documents recognised by their windows' digests, whatever their names."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from data.cache.codec.header import MAX_NUMBER
from data.cache.record import Array, Record


def window_digest(start: int, token_ids: Array) -> bytes:
    """Returns 16 bytes that identify a window by its start in the document and its tokens."""
    return hashlib.sha256(f"{start} ".encode() + np.asarray(token_ids, "<i4").tobytes()).digest()[:16]


def mask_digest(loss_mask: Array) -> bytes:
    """Returns 16 bytes by which the labels to score of a window are known."""
    return hashlib.sha256(np.asarray(loss_mask, np.uint8).tobytes()).digest()[:16]


def windows_digest(windows: Iterable[bytes]) -> str:
    """Returns the sha256 over the digests of windows or of their masks, in order."""
    total = hashlib.sha256()
    for window in windows:
        total.update(window)
    return total.hexdigest()


@dataclass
class CachedDocuments:
    """The documents of caches, each identified by its windows in the cache."""

    # By document: its name, its number of windows, and its cache.
    name_of: list[str] = field(default_factory=list[str])
    windows_of: list[int] = field(default_factory=list[int])
    cache_of: list[str] = field(default_factory=list[str])
    # By the digest of a window: the documents that have it.
    documents_with: dict[bytes, list[int]] = field(default_factory=dict[bytes, list[int]])

    def add(self, records: Iterable[Record], cache: str = "") -> None:
        """Adds the documents of a cache. Consecutive records of one name and with rising starts are one document."""
        last_start = MAX_NUMBER
        for record in records:
            if record.start <= last_start or record.document != self.name_of[-1]:
                self.name_of.append(record.document)
                self.windows_of.append(0)
                self.cache_of.append(cache)
            last_start = record.start
            self.windows_of[-1] += 1
            digest = window_digest(record.start, record.token_ids)
            self.documents_with.setdefault(digest, []).append(len(self.windows_of) - 1)

    def hold(self, windows: Iterable[bytes]) -> bool:
        """Checks whether all windows of one of these documents are among the digests `windows`."""
        return bool(self.among(windows))

    def caches_with_any(self, windows: Iterable[bytes]) -> set[str]:
        """Returns the caches that have at least one of `windows`, as when a document has been continued since."""
        return {self.cache_of[document] for window in windows for document in self.documents_with.get(window, ())}

    def among(self, windows: Iterable[bytes]) -> list[str]:
        """Returns the names of the documents whose windows are all among `windows`."""
        common = Counter(document for window in set(windows) for document in self.documents_with.get(window, ()))
        return [self.name_of[document] for document, count in common.items() if count == self.windows_of[document]]
