"""Rows that cannot be used: they stop an export with one message, or are skipped, counted and named in a file."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, ParamSpec, TypeVar

from data.text_lines import BadRowError
from kd_core.errors import UsageError
from kd_core.files import is_plain_file, write_text

log = logging.getLogger("kd")
T = TypeVar("T")
P = ParamSpec("P")
OnBadRow = Literal["stop", "skip"]
FILE = "skipped_rows.jsonl"
LOOKED_AT = 20_000  # rows after the first bad one, to count what else is bad


class _Bad(NamedTuple):
    row: str
    reason: str
    message: str


class BadRows:
    """What becomes of bad rows, and those that were met."""

    def __init__(self, on_bad_row: OnBadRow | Literal["raise"], most: float = 0) -> None:
        """`on_bad_row`: count what else is bad and stop, skip up to `most`, or raise at once."""
        self.on_bad_row, self.most = on_bad_row, most
        self.rows = self.rows_at_first = 0
        self.bad: list[_Bad] = []

    @property
    def will_stop(self) -> bool:
        """Whether an error will be raised, and nothing need be made of other rows but a count."""
        return bool(self.bad) and self.on_bad_row == "stop"

    def counts(self) -> dict[str, int]:
        """How many rows are bad, by reason, the most frequent first."""
        return dict(Counter(each.reason for each in self.bad).most_common())

    def count_row(self) -> None:
        """Counts a row of the corpus.

        Raises:
            UsageError: enough rows were looked at after the first bad one.
        """
        self.rows += 1
        if self.will_stop and self.rows - self.rows_at_first > LOOKED_AT:
            self._stop(f"the {LOOKED_AT} rows that follow")

    def attempt(self, row: str, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> Iterator[T]:
        """Yields what `work` makes of a row, or nothing where the row is bad."""
        try:
            made = work(*args, **named)
        except BadRowError as error:
            self.add(row, error)
            return
        yield made

    def add(self, row: str, error: BadRowError) -> None:
        """Takes a bad row.

        Raises:
            UsageError: it is to be raised at once, or more rows are bad than `most` allows, where that is a number.
        """
        if self.on_bad_row == "raise":
            raise error
        self.rows_at_first = self.rows_at_first or self.rows
        self.bad.append(_Bad(row, error.reason, str(error)))
        if self.on_bad_row == "skip" and self.most >= 1 and len(self.bad) > self.most:
            self._refuse()

    def finish(self, corpus: str) -> None:
        """Ends the pass over a corpus: says what is skipped.

        Raises:
            UsageError: there are bad rows and none may be skipped, or more than may be.
        """
        if self.will_stop:
            self._stop("the rows that follow")
        allowed = self.most if self.most >= 1 else self.most * self.rows
        if len(self.bad) > allowed:
            self._refuse()
        if self.bad:
            log.warning("corpus %s: %d of %d rows skipped: %s", corpus, len(self.bad), self.rows, self._by_reason())

    def _by_reason(self, start: int = 0) -> str:
        counts = Counter(each.reason for each in self.bad[start:])
        return ", ".join(f"{number} {reason}" for reason, number in counts.most_common())

    def _stop(self, following: str) -> None:
        if len(self.bad) == 1:
            raise BadRowError(self.bad[0].message, self.bad[0].reason)
        raise BadRowError(
            f"{self.bad[0].message}\nOf {following}, {len(self.bad) - 1} cannot be used either: {self._by_reason(1)}. "
            "Mend them, or leave them out: corpus.on_bad_row=skip.",
            self.bad[0].reason,
        )

    def _refuse(self) -> None:
        raise UsageError(
            f"{len(self.bad)} of {self.rows} rows cannot be used ({self._by_reason()}), more than "
            f"corpus.most_bad_rows={self.most:g} allows. The first: {self.bad[0].message}\nMend them, or allow more: "
            f"corpus.most_bad_rows={len(self.bad)}."
        )

    def write(self, folder: Path) -> None:
        """Write which rows were skipped beside the caches, after those that an earlier export there skipped."""
        if not self.bad:
            return
        path = folder / FILE
        before = path.read_bytes().decode(errors="replace").splitlines() if is_plain_file(path) else []
        lines = dict.fromkeys([*before, *(json.dumps(each._asdict(), ensure_ascii=False) for each in self.bad)])
        write_text(path, "".join(line + "\n" for line in lines))
