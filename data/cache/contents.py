"""Digests of windows, and documents recognised by their windows' digests, whatever their names."""

import hashlib
import sqlite3
import weakref
from collections import Counter
from collections.abc import Iterable

import numpy as np

from data.cache.codec.header import MAX_NUMBER
from data.cache.record import Array, Record

PROMPT_MARK = "#teacher_prompt="  # in the name of a document that the teacher read behind another prompt


def window_digest(start: int, token_ids: Array) -> bytes:
    """Returns 16 bytes that identify a window by its start in the document and its tokens."""
    return hashlib.sha256(f"{start} ".encode() + np.asarray(token_ids, "<i4").tobytes()).digest()[:16]


def prompt_digest(context: Array | None) -> str:
    """Returns a text that identifies the prompt that the teacher alone read, or nothing without one."""
    return "" if context is None else hashlib.sha256(np.asarray(context, "<i4").tobytes()).hexdigest()[:16]


def prompted_name(name: str, context: Array | None) -> str:
    """Returns the name of a document as its records have it, which also says which prompt the teacher read."""
    return name if context is None else f"{name}{PROMPT_MARK}{prompt_digest(context)}"


def mask_digest(loss_mask: Array) -> bytes:
    """Returns 16 bytes by which the labels to score of a window are known."""
    return hashlib.sha256(np.asarray(loss_mask, np.uint8).tobytes()).digest()[:16]


def record_digest(record: Record) -> bytes:
    """Returns 32 bytes that identify a record without its entries: the digests of its window and of its mask."""
    return window_digest(record.start, record.token_ids) + mask_digest(record.loss_mask)


def windows_digest(windows: Iterable[bytes]) -> str:
    """Returns the sha256 over the digests of windows, of their masks or of records, in order."""
    total = hashlib.sha256()
    for window in windows:
        total.update(window)
    return total.hexdigest()


def _name(name: str) -> bytes:
    """Returns a name as the table has it. One of a damaged cache may hold half a surrogate pair."""
    return name.encode(errors="surrogatepass")


class CachedDocuments:
    """The documents of caches, each identified by its windows in the cache. They are a table on disk, not in memory.

    Windows of equal tokens behind unlike prompts of the teacher (`prompt_digest`) are not the same.
    """

    def __init__(self) -> None:
        # A database without a name is a private file, which ends with its connection.
        self._tables = sqlite3.connect("", isolation_level=None)
        self._whole = set[str]()  # caches that have every window of their documents
        weakref.finalize(self, self._tables.close)
        self._tables.executescript(
            "PRAGMA journal_mode = OFF;"
            "CREATE TABLE documents (number INTEGER PRIMARY KEY, name BLOB, prompt TEXT, windows INTEGER,"
            " cache TEXT);"
            "CREATE TABLE windows (digest BLOB, document INTEGER);"
            "CREATE TABLE remembered (digest BLOB PRIMARY KEY) WITHOUT ROWID;"
        )

    def add(self, records: Iterable[Record], cache: str = "", *, is_whole: bool = False) -> None:
        """Adds the documents of a cache. Consecutive records of one name and with rising starts are one document.

        Args:
            records: all records of the cache.
            cache: its name.
            is_whole: the cache has every window of its documents, and not only some that were drawn.
        """
        if is_whole:
            self._whole.add(cache)
        (number,) = self._tables.execute("SELECT COUNT(*) FROM documents").fetchone()
        name, last_start, count = "", MAX_NUMBER, 0
        for record in records:
            if record.start <= last_start or record.document != name:
                self._add_document(number, name, count, cache)
                number, name, count = number + bool(count), record.document, 0
            last_start, count = record.start, count + 1
            digest = window_digest(record.start, record.token_ids)
            self._tables.execute("INSERT INTO windows VALUES (?, ?)", (digest, number))
        self._add_document(number, name, count, cache)
        self._tables.execute("CREATE INDEX IF NOT EXISTS by_digest ON windows (digest)")
        self._tables.execute("CREATE INDEX IF NOT EXISTS by_name ON documents (name)")

    def _add_document(self, number: int, name: str, windows: int, cache: str) -> None:
        if windows:
            name, _, prompt = name.partition(PROMPT_MARK)
            values = (number, _name(name), prompt.encode(errors="replace").decode(), windows, cache)
            self._tables.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", values)

    def _documents_with(self, window: bytes, prompt: str | None = None) -> list[int]:
        """Returns the numbers of the documents that have a window, behind this prompt or any (None)."""
        query = "SELECT number FROM windows JOIN documents ON number = document WHERE digest = ?"
        query += "" if prompt is None else " AND prompt = ?"
        rows = self._tables.execute(query, (window,) if prompt is None else (window, prompt))
        return [number for (number,) in rows]

    def _facts(self, document: int) -> tuple[str, int, str]:
        """Returns the name of a document, its number of windows, and its cache."""
        query = "SELECT name, windows, cache FROM documents WHERE number = ?"
        name, windows, cache = self._tables.execute(query, (document,)).fetchone()
        return name.decode(errors="surrogatepass"), windows, cache

    def has_name(self, name: str) -> bool:
        """Checks whether a document has this name."""
        return self._tables.execute("SELECT 1 FROM documents WHERE name = ?", (_name(name),)).fetchone() is not None

    def remember(self, digest: bytes) -> bool:
        """Remembers the digest of a new document's content. Returns False where it was remembered before."""
        return self._tables.execute("INSERT OR IGNORE INTO remembered VALUES (?)", (digest,)).rowcount > 0

    def hold(self, windows: Iterable[bytes], prompt: str) -> bool:
        """Checks whether a document of these windows behind this prompt is there.

        It is if all windows of one of these documents are among them. Where that document is of a whole cache, all
        `windows` must be there too, because the document may have been continued behind a full window.
        """
        digests = set(windows)
        caches = {cache for _, cache in self._all_among(digests, prompt)}
        if not caches or not caches <= self._whole:
            return bool(caches)
        return all(self._documents_with(digest, prompt) for digest in digests)

    def caches_with_any(self, windows: Iterable[bytes], prompt: str | None = None) -> set[str]:
        """Returns the caches that have at least one of `windows`, as when a document has been continued since.

        They have it behind this prompt, or behind any (None).
        """
        return {self._facts(document)[2] for window in windows for document in self._documents_with(window, prompt)}

    def among(self, windows: Iterable[bytes]) -> list[str]:
        """Returns the names of the documents whose windows are all among `windows`."""
        return [name for name, _ in self._all_among(set(windows))]

    def _all_among(self, windows: set[bytes], prompt: str | None = None) -> list[tuple[str, str]]:
        """Returns name and cache of the documents whose windows are all among `windows`."""
        common = Counter(document for window in windows for document in self._documents_with(window, prompt))
        facts = ((self._facts(document), count) for document, count in common.items())
        return [(name, cache) for (name, windows_there, cache), count in facts if count == windows_there]
