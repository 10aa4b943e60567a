"""The header of a block, `NAME.json`: its records, planes and sizes, each checked against bounds.

Whoever writes a cache also writes its hashes, so a matching hash does not make a size trustworthy. What is allocated
for a block is bounded by `MAX_POSITIONS` and `MAX_ENTRIES_A_BLOCK`, not by what a few bytes of it declare. No regular
block comes near these bounds.
"""

import json
from dataclasses import dataclass

from kd_core.json_fields import check_integer, check_list, check_number, check_object, check_text

MAX_POSITIONS = 1 << 20
MAX_ENTRIES = 65535
# Positions × entries of the widest one. 512 positions of 65,535 entries take some 800 MB while they are decoded.
MAX_ENTRIES_A_BLOCK = 1 << 25
MAX_NUMBER = 1 << 53
MAX_JSON_BYTES = 1 << 24  # parsed, it takes some twenty times as much memory
# Upper bounds of what planes store per entry or sample, and per position.
BYTES_A_CELL, BYTES_A_POSITION = 8, 64


@dataclass(frozen=True)
class Header:
    """The fields of `NAME.json`.

    `records` has the document, the start and the number of positions of each record. `planes` has the bytes of each
    plane by member. `entries` and `samples` are the most that any position of the block has.
    """

    first: int
    records: list[tuple[str, int, int]]
    planes: dict[str, list[int]]
    entries: int
    samples: int
    audit: dict[str, float]

    @property
    def positions(self) -> int:
        """Returns the number of positions of all records."""
        return sum(positions for _, _, positions in self.records)

    def sizes(self, member: str, temperatures: int) -> list[int]:
        """Returns the bytes of each plane of a member.

        Raises:
            ValueError: they are more than a block of so many positions and entries can have.
        """
        sizes = self.planes.get(member, [])
        # Each further temperature adds a tail, at most a float32 a position.
        bytes_a_position = BYTES_A_POSITION + 4 * temperatures
        most = self.positions * (bytes_a_position + BYTES_A_CELL * max(self.entries, self.samples))
        if sum(sizes) > most:
            raise ValueError(f"declares planes of {sum(sizes)} bytes; a block of its size has at most {most}")
        return sizes

    @classmethod
    def parse(cls, payload: bytes) -> "Header":
        """Parses `NAME.json` and checks that every number is in bounds.

        Raises:
            ValueError: it is not JSON, or a field is missing, unknown, of another type or out of bounds.
        """
        if len(payload) > MAX_JSON_BYTES:
            raise ValueError(f"json: has {len(payload)} bytes; at most {MAX_JSON_BYTES} are read")
        try:
            value = check_object(json.loads(payload.decode()), "it")
            # While a block is encoded, its header is parsed once without the audit, which is measured by decoding it.
            value = check_object(
                {"audit": {}, **value}, "it", ("audit", "entries", "first", "planes", "records", "samples")
            )
            records = [_record(record) for record in check_list(value["records"], "records")]
            header = cls(
                check_integer(value["first"], "first", 0, MAX_NUMBER),
                records,
                {name: _sizes(sizes, name) for name, sizes in check_object(value["planes"], "planes").items()},
                check_integer(value["entries"], "entries", 0, MAX_ENTRIES),
                check_integer(value["samples"], "samples", 0, MAX_ENTRIES),
                {name: check_number(error, name) for name, error in check_object(value["audit"], "audit").items()},
            )
            # Bound positions × entries before any plane is decompressed.
            check_size(header.positions, max(header.entries, header.samples))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"json: {error}") from None
        return header


def check_size(positions: int, widest: int) -> None:
    """Raises ValueError for a block that is empty or larger than readers accept."""
    if not 1 <= positions <= MAX_POSITIONS or positions * widest > MAX_ENTRIES_A_BLOCK:
        raise ValueError(
            f"a block of {positions} positions with up to {widest} entries; wanted 1 to {MAX_POSITIONS} "
            f"positions, and at most {MAX_ENTRIES_A_BLOCK} places in all (smaller block_positions make smaller blocks)"
        )


def _record(value: object) -> tuple[str, int, int]:
    document, start, positions = check_list(value, "a record")
    return (
        check_text(document, "document"),
        check_integer(start, "start", 0, MAX_NUMBER),
        check_integer(positions, "positions", 1, MAX_POSITIONS),
    )


def _sizes(value: object, name: str) -> list[int]:
    return [
        check_integer(size, f"planes of {name}", 0, BYTES_A_CELL * MAX_ENTRIES_A_BLOCK)
        for size in check_list(value, name)
    ]
