"""The state of a pass over a corpus: how far it has come, what it has counted, and which rows it could not use."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.corpus.bad_rows import BadRow
from data.corpus.row_encoding import EncodingFacts, Place
from data.export.spool.spool_parts import SPLITS, part_path, read_state
from kd_core.files import damage_as_usage_error


@dataclass
class PassState:
    """Progress of a pass: the place behind it, and sums over the rows before that."""

    place: Place = Place()  # noqa: RUF009 (it is immutable)
    bytes: int = 0
    rows: int = 0
    left_out: int = 0
    documents: int = 0
    bad: list[BadRow] = field(default_factory=list[BadRow])
    facts: EncodingFacts = field(default_factory=EncodingFacts)
    taken: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # positions of windows
    drawn_from: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def add(self, other: "PassState") -> None:
        """Adds what a pass did behind this one."""
        self.place = other.place
        for name in ("bytes", "rows", "left_out", "documents"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad.extend(other.bad)
        self.facts.add(other.facts)
        for split in SPLITS:
            self.taken[split] += other.taken[split]
            self.drawn_from[split] += other.drawn_from[split]

    def to_json(self) -> dict[str, Any]:
        """Returns the state as JSON values."""
        return {**vars(self), "facts": self.facts.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PassState":
        """Returns the state that `to_json` has given."""
        state = cls(**value)
        state.place, state.bad = Place(*state.place), [BadRow(*row) for row in state.bad]
        state.facts = EncodingFacts.from_json(value["facts"])
        return state


def part_states(spool: Path) -> Iterator[PassState]:
    """Yields the states of a spool's parts. Each has what was done since the part before.

    Raises:
        UsageError: a part is damaged.
    """
    number = 0
    while (path := part_path(spool, number)).exists():
        with damage_as_usage_error(path, "a part of a spool", "Delete the spool"):
            yield PassState.from_json(read_state(path))
        number += 1
