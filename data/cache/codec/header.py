"""`NAME.json` of a block: what is in it, in bounds that no honest block comes near and no decoder suffers from.

Whoever writes a cache also writes its hashes, so every size here is taken for an enemy's: what is allocated for a
block is bounded by `MAX_POSITIONS` and `MAX_CELLS`, not by what a few bytes of it declare.
"""

import json
from dataclasses import dataclass

from kd_core.json_fields import fields, integer, items, number, text

MAX_POSITIONS = 1 << 20
MAX_ENTRIES = 65535
MAX_CELLS = 1 << 25  # positions × widest of them: 512 positions of 65,535 entries; some 800 MB while it is decoded
MAX_NUMBER = 1 << 53
MAX_JSON_BYTES = 1 << 24  # what it becomes in memory is some twenty times as large
BYTES_A_CELL, BYTES_A_POSITION = 8, 64  # planes never take up more


@dataclass(frozen=True)
class Header:
    """What `NAME.json` says. `records` has document, start and positions of each."""

    first: int
    records: list[tuple[str, int, int]]
    planes: dict[str, list[int]]
    entries: int
    samples: int
    audit: dict[str, float]

    @property
    def positions(self) -> int:
        """Of all records."""
        return sum(positions for _, _, positions in self.records)

    def sizes(self, member: str, temperatures: int) -> list[int]:
        """Bytes of each plane of a member.

        Raises:
            ValueError: more than a block of so many positions and entries can have.
        """
        found = self.planes.get(member, [])
        a_position = BYTES_A_POSITION + 4 * temperatures
        most = self.positions * (a_position + BYTES_A_CELL * max(self.entries, self.samples))
        if sum(found) > most:
            raise ValueError(f"declares planes of {sum(found)} bytes; a block of its size has {most} at the most")
        return found

    @classmethod
    def of(cls, payload: bytes) -> "Header":
        """Read it, with every number in bounds.

        Raises:
            ValueError: not JSON, or a field is missing, unknown, of another type or out of bounds.
        """
        if len(payload) > MAX_JSON_BYTES:
            raise ValueError(f"json: has {len(payload)} bytes; at most {MAX_JSON_BYTES} are read")
        try:
            value = fields(json.loads(payload.decode()), "it")
            # The audit is added once the block is encoded and decoded again.
            value = fields({"audit": {}, **value}, "it", ("audit", "entries", "first", "planes", "records", "samples"))
            records = [_record(each) for each in items(value["records"], "records")]
            found = cls(
                integer(value["first"], "first", 0, MAX_NUMBER),
                records,
                {name: _sizes(sizes, name) for name, sizes in fields(value["planes"], "planes").items()},
                integer(value["entries"], "entries", 0, MAX_ENTRIES),
                integer(value["samples"], "samples", 0, MAX_ENTRIES),
                {name: number(error, name) for name, error in fields(value["audit"], "audit").items()},
            )
            check_size(found.positions, max(found.entries, found.samples))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"json: {error}") from None
        return found


def check_size(positions: int, widest: int) -> None:
    """Refuse a block that is empty, or larger than any reader takes."""
    if not 1 <= positions <= MAX_POSITIONS or positions * widest > MAX_CELLS:
        raise ValueError(
            f"a block of {positions} positions with up to {widest} entries; wanted 1 to {MAX_POSITIONS} "
            f"positions, and at most {MAX_CELLS} places in all (smaller block_positions make smaller blocks)"
        )


def _record(value: object) -> tuple[str, int, int]:
    document, start, positions = items(value, "a record")
    return (
        text(document, "document"),
        integer(start, "start", 0, MAX_NUMBER),
        integer(positions, "positions", 1, MAX_POSITIONS),
    )


def _sizes(value: object, name: str) -> list[int]:
    return [integer(size, f"planes of {name}", 0, BYTES_A_CELL * MAX_CELLS) for size in items(value, name)]
