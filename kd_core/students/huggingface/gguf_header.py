"""Check of a GGUF file's header before the library reads it, because the library trusts all counts in it.

magic, version ─ counts of tensors and fields ─ fields: name, type, value ─ tensors: name, dims, type, offset
"""

import os
import struct
from pathlib import Path
from typing import IO

from kd_core.files import damage_as_usage_error, open_plain

WANTED = "a GGUF file of version 2 or 3"
MOST_FIELDS = MOST_TENSORS = 1 << 16
MOST_ITEMS = 1 << 21  # of all arrays: the library makes some 400 bytes of objects for each item
MOST_NAME = 1 << 10
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _Reader:
    """Reader of numbers and strings that refuses those that end past the end of the file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.items = file, os.fstat(file.fileno()).st_size, 0

    def number(self, form: str) -> int:
        payload = self.file.read(struct.calcsize(form))
        return int(struct.unpack(form, payload)[0])

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError(f"{count} bytes at {self.file.tell()}, in a file of {self.size}")
        self.file.seek(count, os.SEEK_CUR)

    def count(self, noun: str, most: int, form: str = "<Q") -> int:
        count = self.number(form)
        if count > most:
            raise ValueError(f"{count} {noun}; at most {most} are read")
        return count

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.skip(self.number("<Q"))
        elif kind == ARRAY:
            self.array(self.number("<I"))
        else:
            self.skip(SIZES[kind])

    def array(self, kind: int) -> None:
        count = self.count("items", MOST_ITEMS - self.items)
        self.items += count
        if kind in SIZES:
            self.skip(count * SIZES[kind])
            return
        if kind != STRING:
            raise ValueError("an array of arrays")
        for _ in range(count):
            self.skip(self.number("<Q"))


def check_header(path: Path) -> None:
    """Checks that the header's counts and lengths are in bounds and inside the file.

    Raises:
        UsageError: they are not, or it is no GGUF file.
    """
    with open_plain(path, WANTED) as file, damage_as_usage_error(path, WANTED, "Fetch it again"):
        reader = _Reader(file)
        if file.read(4) != b"GGUF" or reader.number("<I") not in (2, 3):
            raise ValueError("other first bytes")
        tensors = reader.count("tensors", MOST_TENSORS)
        for _ in range(reader.count("fields", MOST_FIELDS)):
            reader.skip(reader.count("bytes of a name", MOST_NAME))
            reader.value(reader.number("<I"))
        for _ in range(tensors):
            reader.skip(reader.count("bytes of a name", MOST_NAME))
            dimensions = reader.count("dimensions", 4, "<I")
            reader.skip(8 * dimensions + 4)
            if (offset := reader.number("<Q")) > reader.size:
                raise ValueError(f"a tensor at {offset}, in a file of {reader.size} bytes")
