"""Lines of text and JSON from files of any origin, plain or compressed, within bounds on memory.

    file → open_unpacked → lines_of: length of a line, size unpacked → decoded: UTF-8 → json_value → json_object

A line without end and a decompression bomb raise an error before they fill the memory.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from kd_core.errors import UsageError
from kd_core.files import open_plain, printable

MAX_LINE_BYTES = 1 << 25  # bytes; parsed JSON takes some twenty times as much memory
MAX_UNPACKED_BYTES, MOST_RATIO = 1 << 28, 200  # unpacked bytes above which the ratio to the file's size is bounded
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ZSTD_STEP = 1 << 10  # packed bytes at a time, which unpack to at most 32 MiB


class BadRowError(UsageError):
    """A row of a corpus that cannot be used. `reason` names the kind of error, so that rows can be counted by it."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class _ZstdFile(io.RawIOBase):
    """A reader of consecutive zstd frames that raises EOFError where the last one is cut off.

    The reader of `zstandard` ends there without an error.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.frame: Any = None
        self.packed = self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            self.packed = self.packed or self.file.read(ZSTD_STEP)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.ready = self.frame.decompress(self.packed)
            self.packed = self.frame.unused_data
            self.frame = None if self.frame.eof else self.frame
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


PACKED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    ".zst": lambda file: io.BufferedReader(_ZstdFile(file), 1 << 16),
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


@contextmanager
def open_unpacked(path: Path, description: str) -> Generator[IO[bytes]]:
    """Opens a file for reading, and decompresses it where its ending is one of `PACKED`.

    `description` names the file in error messages.

    Raises:
        UsageError: it is not a plain file, or damaged.
    """
    ending = path.suffix.lower()
    with open_plain(path, description) as file:
        if ending not in PACKED:
            yield file
            return
        try:
            with PACKED[ending](file) as unpacked:
                yield unpacked
        except (*DAMAGE, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # errors of gzip and bz2 have no errno
                raise
            kind = {".gz": "gzip", ".zst": "zstd"}.get(ending, ending[1:])
            raise UsageError(f"{printable(path)}: damaged {kind} ({error}). Fetch or write it again.") from None


def read_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file, compressed or not.

    Raises:
        UsageError: it is not a plain file, is damaged, has a line above `MAX_LINE_BYTES`, or is a decompression bomb.
    """
    number = unpacked_bytes = 0
    with open_unpacked(path, "a file of lines") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number, unpacked_bytes = number + 1, unpacked_bytes + len(line)
            if len(line) > MAX_LINE_BYTES:
                raise UsageError(
                    f"{printable(path)}:{number}: a line of more than {MAX_LINE_BYTES} bytes. Wanted a row a line; "
                    "split it."
                )
            check_unpacked_size(path, unpacked_bytes)
            yield line


def check_unpacked_size(path: Path, unpacked_bytes: int) -> None:
    """Raises UsageError where a small file unpacks to a large one, as a decompression bomb does.

    Text compresses to a tenth of its size, seldom to a hundredth.
    """
    if unpacked_bytes > MAX_UNPACKED_BYTES and unpacked_bytes > MOST_RATIO * (size := path.stat().st_size):
        raise UsageError(
            f"{printable(path)}: {size} bytes unpack to {unpacked_bytes} and more, {MOST_RATIO} times as much. That "
            "is not text; if you trust it, unpack it yourself."
        )


def decode_utf8(payload: bytes, where: str) -> str:
    """Decodes UTF-8 bytes, and drops a byte order mark.

    Raises:
        BadRowError: the bytes are not UTF-8.
    """
    try:
        return payload.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        message = f"{where}: not UTF-8 text ({error.reason} at byte {error.start}). Convert it, e.g. with iconv."
        raise BadRowError(message, "not UTF-8") from None


def parse_json(text: str, where: str) -> Any:
    """Parses a JSON text.

    Raises:
        BadRowError: it is not JSON, or has half a surrogate pair in a string.
    """
    try:
        value = json.loads(text)
        check_surrogates(value, text, where)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        if isinstance(error, BadRowError):
            raise
        over_many_lines = text.lstrip().startswith("[") or text.strip() == "{"
        hint = " Is it one value over many lines? Wanted an object a line: jq -c." if over_many_lines else ""
        raise BadRowError(f"{where}: not JSON ({getattr(error, 'msg', error)}).{hint}", "not JSON") from None
    return value


def check_surrogates(value: Any, text: str, where: str) -> None:
    """Checks that a parsed JSON text has no half of a surrogate pair, which is not a character.

    Raises:
        BadRowError: there is one.
    """
    try:
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        message = f"{where}: half a surrogate pair ({error.object[error.start]!a}) is no text."
        raise BadRowError(message, "half a surrogate pair") from None


def require_object(value: Any, where: str) -> dict[str, Any]:
    """Returns the value if it is a JSON object.

    Raises:
        BadRowError: it is something else.
    """
    if not isinstance(value, dict):
        hint = " One object a line: jq -c '.[]'." if isinstance(value, list) else ""
        message = f"{where}: holds a {type(value).__name__}, wanted a JSON object.{hint}"
        raise BadRowError(message, "not a JSON object")
    return cast(dict[str, Any], value)


def drop_nulls(value: Any) -> Any:
    """Returns the value without fields that are null, at any depth. Parquet writes null for absent fields."""
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        return {key: drop_nulls(item) for key, item in fields.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in cast(list[Any], value)]
    return value
