"""Storage of a cache's files: a folder of this machine, or a URL. A new kind of storage is one more class here.

    storage_at(path) ─► Storage: read a whole file, open one for ranges, list files, write a whole file

Only the schemes of `PROGRAMS` reach webdataset, because it would run commands for some others.
"""

import os
import re
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol

from data.cache import webdataset_io
from kd_core.errors import UsageError
from kd_core.files import open_no_follow

PROGRAMS = {"http": "curl", "https": "curl", "gs": "gsutil", "ais": "ais"}
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
PLAIN_URL = re.compile(r"[a-z]+://[A-Za-z0-9][A-Za-z0-9.:-]*(/[A-Za-z0-9._~%+,=:@-]*)*")
RETRIES = 3
RETRY_SECONDS = 1.0  # before the first retry, and twice as long before each further one
CHUNK_BYTES = 1 << 20
CURL_STATUS = {
    6: "the host is not known",
    7: "no connection",
    18: "the transfer ended early",
    22: "the server answers with an error, as 404 (no such file)",
    28: "timed out",
    52: "the server sent nothing",
    56: "the connection broke",
}
FINAL_CURL_STATUS = (3, 6, 22)  # not retried here; curl itself retries when a server reports that it is busy


class RangeReader(Protocol):
    """An open file, read by ranges in ascending order."""

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset` on, fewer where the file ends.

        Raises:
            UsageError: the file cannot be read.
        """
        ...

    def stop(self) -> None:
        """Ends a read under way, from any thread. The reading thread gets an error."""
        ...

    def close(self) -> None:
        """Closes the file, in the thread that reads."""
        ...


class Storage(Protocol):
    """The files of one cache, by their names."""

    def url(self, name: str) -> str:
        """Returns the path or URL of a file, as messages show it."""
        ...

    def size(self, name: str) -> int | None:
        """Returns a file's size in bytes, or None where only reading the whole file would show it.

        Raises:
            UsageError: there is no such file.
        """
        ...

    def read(self, name: str, most: int) -> bytes:
        """Returns a whole file.

        Raises:
            UsageError: the file cannot be read, or has more than `most` bytes.
        """
        ...

    def open(self, name: str) -> RangeReader: ...

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file atomically: it is complete or absent, whatever happens.

        Raises:
            UsageError: this kind of storage cannot be written.
        """
        ...


def is_url(path: str) -> bool:
    return SCHEME.match(path) is not None


def storage_at(path: Path | str) -> Storage:
    """Returns the storage that holds the cache at a path or URL.

    Raises:
        UsageError: the URL's scheme is not in `PROGRAMS`, or it holds more than a host and a plain path.
    """
    return UrlStorage(str(path)) if is_url(str(path)) else LocalStorage(Path(path))


class LocalStorage:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def url(self, name: str) -> str:
        return str(self.folder / name)

    def size(self, name: str) -> int:
        path = self.folder / name
        if not path.is_file():
            raise UsageError(f"{path}: no such file; the manifest names it. Restore it, or export the cache again.")
        return path.stat().st_size

    def read(self, name: str, most: int) -> bytes:
        if (size := self.size(name)) > most:
            raise _too_large(self.url(name), most, size)
        return (self.folder / name).read_bytes()

    def open(self, name: str) -> "LocalFile":
        self.size(name)
        return LocalFile(self.folder / name)

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        partial = self.folder / f"{name}.partial"
        with open(partial, "wb", opener=open_no_follow) as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.folder / name)


class LocalFile:
    """A file of this machine. webdataset's opener opens it anew for each range."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, offset: int, size: int) -> bytes:
        with closing(webdataset_io.open_stream(str(self.path.absolute()))) as stream:
            stream.seek(offset)
            return stream.read(size)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class UrlStorage:
    """A folder behind a URL, read through the program that webdataset runs for its scheme. It cannot be written."""

    def __init__(self, path: str) -> None:
        scheme = path.partition(":")[0]
        if scheme not in PROGRAMS or not webdataset_io.is_supported_scheme(scheme):
            raise UsageError(
                f"{path}: {scheme!r} is no place to read a cache from; wanted a folder, or "
                f"{', '.join(f'{name}://' for name in PROGRAMS)}. (A folder of such a name is ./{path}.)"
            )
        if not PLAIN_URL.fullmatch(path) or "/../" in path + "/":
            raise UsageError(
                f"{path}: wanted {scheme}://HOST/PATH of plain characters: no user, query, braces or brackets, "
                "which the program that opens it would act on."
            )
        self.base = path.rstrip("/")

    def url(self, name: str) -> str:
        return f"{self.base}/{name}"

    def size(self, name: str) -> None:
        del name

    def read(self, name: str, most: int) -> bytes:
        with closing(self.open(name)) as file:
            data = file.read(0, most + 1)
        if len(data) > most:
            raise _too_large(self.url(name), most)
        return data

    def open(self, name: str) -> "RemoteFile":
        return RemoteFile(self.url(name))

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        del chunks
        raise UsageError(f"{self.url(name)}: caches behind a URL are read only. Write to a folder, then copy it there.")


def _too_large(url: str, most: int, size: int | None = None) -> UsageError:
    size_text = "more" if size is None else f"{size} bytes"
    return UsageError(f"{url}: has {size_text}{' than' if size is None else ', wanted at most'} {most} bytes.")


class _TransferError(Exception):
    """Error of a transfer that broke off. `final` means that another attempt would fail too."""

    def __init__(self, cause: str, final: bool) -> None:
        super().__init__(cause)
        self.final = final


class RemoteFile:
    """A file behind a URL. It is opened once and read in order, and skipped bytes are read and dropped.

    A transfer that breaks off is retried a few times before it is an error with its cause.
    """

    def __init__(self, url: str) -> None:
        self.url, self.stream, self.position, self.stopped = url, None, 0, False

    def read(self, offset: int, size: int) -> bytes:
        for attempt in range(RETRIES + 1):
            try:
                return self._read(offset, size)
            except _TransferError as error:
                self.close()
                if error.final or self.stopped or attempt == RETRIES:
                    attempts = f" ({attempt + 1} attempts)" if attempt else ""
                    raise UsageError(
                        f"{self.url}: cannot be read{attempts}: {error}. Check that it can be reached, then run the "
                        "same command again."
                    ) from None
                time.sleep(RETRY_SECONDS * 2**attempt)
        raise AssertionError

    def stop(self) -> None:
        self.stopped = True
        webdataset_io.kill_program(self.stream)

    def close(self) -> None:
        if self.stream is not None:
            webdataset_io.close(self.stream)
        self.stream, self.position = None, 0

    def _read(self, offset: int, size: int) -> bytes:
        if self.position > offset:
            self.close()
        if self.stream is None:
            self.stream = self._open()
        if self.stopped:
            raise _TransferError("it was stopped", True)
        while self.position < offset:
            if not self._read_next(min(CHUNK_BYTES, offset - self.position)):
                return b""
        chunks: list[bytes] = []
        while size > 0 and (chunk := self._read_next(min(CHUNK_BYTES, size))):
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)

    def _open(self) -> Any:
        try:
            return webdataset_io.open_stream(self.url)
        except FileNotFoundError:
            program = PROGRAMS[self.url.partition(":")[0]]
            raise _TransferError(f"the program {program!r}, which opens such URLs, is not installed", True) from None

    def _read_next(self, size: int) -> bytes:
        """Returns the next bytes, or none at the end of the file.

        Raises:
            _TransferError: the transfer broke off before the end.
        """
        data = b""
        with suppress(OSError):  # webdataset raises it for a program that ended with an error
            data = self.stream.read(size)  # pyright: ignore[reportOptionalMemberAccess]
        self.position += len(data)
        if not data and (status := webdataset_io.exit_status(self.stream)):
            program = PROGRAMS[self.url.partition(":")[0]]
            cause = CURL_STATUS.get(status, "") if program == "curl" else ""
            description = f"{program} ended with status {status} after {self.position} bytes{': ' * bool(cause)}{cause}"
            raise _TransferError(description, program == "curl" and status in FINAL_CURL_STATUS)
        return data
