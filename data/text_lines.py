"""Lines of a file that somebody else has written: none without end, and gzip that stays gzip of text."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kd_core.errors import UsageError
from kd_core.files import open_plain

MOST_LINE = 1 << 25  # bytes; what JSON becomes in memory is some twenty times as large
MOST_UNPACKED, MOST_RATIO = 1 << 28, 200


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, gzipped or not.

    Raises:
        UsageError: no plain file, damaged, a line without end, or gzip that unfolds to more than text does.
    """
    with open_plain(path, "a file of lines") as file:
        if path.suffix.lower() != ".gz":
            yield from _bounded_lines(file, path)
            return
        try:
            with gzip.open(file) as unpacked:
                yield from _bounded_lines(unpacked, path)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{path}: damaged gzip ({error}). Fetch or write it again.") from None


def _bounded_lines(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    number = made = 0
    while line := file.readline(MOST_LINE + 1):
        number, made = number + 1, made + len(line)
        if len(line) > MOST_LINE:
            raise UsageError(f"{path}:{number}: a line of more than {MOST_LINE} bytes. Wanted a row a line; split it.")
        refuse_bomb(path, made)
        yield line


def refuse_bomb(path: Path, made: int) -> None:
    """Refuse a small file that becomes a large one: text packs to a tenth, seldom to a hundredth."""
    if made > MOST_UNPACKED and made > MOST_RATIO * (size := path.stat().st_size):
        raise UsageError(
            f"{path}: {size} bytes unfold to {made} and more, {MOST_RATIO} times as much. That is no text; if you "
            "trust it, unpack it yourself."
        )
