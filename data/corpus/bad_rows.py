"""Rows that cannot be used. They stop an export with one message, or are skipped, counted and listed in a file."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, NoReturn, ParamSpec, TypeVar

from data.corpus.layout_hints import config_flag
from data.storage.storage import Storage
from data.text_lines import BadRowError

log = logging.getLogger("kd")
T = TypeVar("T")
P = ParamSpec("P")
OnBadRow = Literal["stop", "skip"]
SKIPPED_ROWS_FILE = "skipped_rows.jsonl"
MAX_SKIPPED_BYTES = 1 << 30
ROWS_READ_AFTER_LIMIT = 20_000  # rows read after the limit was passed, to count further bad ones


class BadRow(NamedTuple):
    """A row that cannot be used: its name, the kind of its error, and the message."""

    row: str
    reason: str
    message: str


class BadRows:
    """Bad rows of a corpus, and a limit to their number.

    Once there are too many, up to `ROWS_READ_AFTER_LIMIT` further rows are read, so that the one message has a count.
    """

    def __init__(self, on_bad_row: OnBadRow | Literal["raise"], most: float = 0) -> None:
        """Sets the limit.

        Args:
            on_bad_row: stop with one message, skip up to `most` rows, or raise the first at once.
            most: a number of rows, or below 1 a share of all rows, rounded up.
        """
        self.on_bad_row, self.most = on_bad_row, most
        self.rows = 0
        self.rows_at_limit: int | None = None
        self.bad: list[BadRow] = []

    def clear(self) -> None:
        """Forgets all rows, before a pass that begins anew."""
        self.rows, self.rows_at_limit = 0, None
        self.bad.clear()

    @property
    def will_stop(self) -> bool:
        """Returns True where there are too many bad rows, so that further ones are only counted."""
        return self.rows_at_limit is not None

    def counts(self) -> dict[str, int]:
        """Counts the bad rows by reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.bad).most_common())

    def count_row(self) -> None:
        """Counts a row of the corpus.

        Raises:
            UsageError: there were too many bad rows, and `ROWS_READ_AFTER_LIMIT` rows have been read since.
        """
        self.rows += 1
        if self.rows_at_limit is not None and self.rows - self.rows_at_limit > ROWS_READ_AFTER_LIMIT:
            self._refuse(f"the {ROWS_READ_AFTER_LIMIT} rows that follow")

    def attempt(self, row: str, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> Iterator[T]:
        """Yields what `work` makes of a row, or nothing where the row is bad."""
        try:
            made = work(*args, **named)
        except BadRowError as error:
            self.add(row, error)
            return
        yield made

    def add(self, row: str, error: BadRowError) -> None:
        """Records a bad row.

        Raises:
            BadRowError: rows are to raise at once.
        """
        if self.on_bad_row == "raise":
            raise error
        self._record([BadRow(row, error.reason, str(error))])

    def merge(self, rows: int, bad: Sequence[BadRow]) -> None:
        """Counts further rows, and records those of them that are bad.

        Raises:
            UsageError: as `count_row`.
        """
        self.rows += rows - 1
        self.count_row()
        self._record(bad)

    def _record(self, bad: Sequence[BadRow]) -> None:
        self.bad.extend(bad)
        # A share of all rows is only checked at the end, when their number is known.
        limit = 0 if self.on_bad_row == "stop" else self.most if self.most >= 1 else math.inf
        if self.rows_at_limit is None and len(self.bad) > limit:
            self.rows_at_limit = self.rows

    def finish(self, corpus: str) -> None:
        """Ends the pass over a corpus, and logs how many rows were skipped.

        Raises:
            UsageError: there are more bad rows than may be skipped.
        """
        if self.will_stop or (self.most < 1 and len(self.bad) > math.ceil(self.most * self.rows)):
            self._refuse("the rows that follow")
        if self.bad:
            log.warning("corpus %s: %d of %d rows skipped: %s", corpus, len(self.bad), self.rows, self._by_reason())

    def _by_reason(self, start: int = 0) -> str:
        counts = Counter(row.reason for row in self.bad[start:])
        return ", ".join(f"{number} {reason}" for reason, number in counts.most_common())

    def _refuse(self, following: str) -> NoReturn:
        first, more = self.bad[0], len(self.bad) - 1
        summary = f"Of {following}, {more} cannot be used either: {self._by_reason(1)}. " if more else ""
        remedy = "Fix it, or skip such rows: corpus.on_bad_row=skip."
        if self.on_bad_row == "skip":
            summary = f"{len(self.bad)} of {self.rows} rows cannot be used: {self._by_reason()}. "
            allowed = config_flag(most_bad_rows=len(self.bad))
            remedy = f"corpus.most_bad_rows={self.most:g} allows fewer. Fix them, or allow more: {allowed}."
        raise BadRowError(f"{first.message}\n{summary}{remedy}", first.reason)

    def write(self, storage: Storage) -> None:
        """Writes the skipped rows to a file beside the caches, behind those of earlier exports."""
        if not self.bad:
            return
        name = SKIPPED_ROWS_FILE
        before = b"" if storage.size(name) is None else storage.read(name, MAX_SKIPPED_BYTES)
        rows = (json.dumps(row._asdict(), ensure_ascii=False) for row in self.bad)
        lines = dict.fromkeys([*before.decode(errors="replace").splitlines(), *rows])
        storage.write(name, ["".join(line + "\n" for line in lines).encode()])
