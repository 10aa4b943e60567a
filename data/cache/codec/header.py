"""`NAME.json` of a block: what is in it."""

import json
from dataclasses import dataclass

MAX_POSITIONS = 1 << 22
MAX_ENTRIES = 65535


@dataclass(frozen=True)
class Header:
    """What `NAME.json` says. `records` has document, start and positions of each."""

    first: int
    records: list[tuple[str, int, int]]
    planes: dict[str, list[int]]
    entries: int
    samples: int
    audit: dict[str, float]

    @classmethod
    def of(cls, payload: bytes) -> "Header":
        """Read it, with every number in bounds."""
        try:
            value = json.loads(payload)
            records = [(str(document), int(start), int(positions)) for document, start, positions in value["records"]]
            planes = {str(name): [int(size) for size in sizes] for name, sizes in value["planes"].items()}
            entries, samples, first = int(value["entries"]), int(value["samples"]), int(value["first"])
            found = cls(first, records, planes, entries, samples, dict(value.get("audit", {})))
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"json: a field is missing or is none ({error!r})") from None
        sizes = [size for of_member in planes.values() for size in of_member]
        lengths = [positions for _, _, positions in records]
        if min(sizes, default=0) < 0 or min(lengths, default=0) < 1 or not lengths or sum(lengths) > MAX_POSITIONS:
            raise ValueError(f"json: declares {len(lengths)} records of {sum(lengths)} positions")
        if not (0 <= entries <= MAX_ENTRIES and 0 <= samples <= MAX_ENTRIES and first >= 0):
            raise ValueError(f"json: declares {entries} entries and {samples} samples a position, first {first}")
        return found
