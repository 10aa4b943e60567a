"""Where a cache lies: a folder of this machine, or behind a URL. Its files as bytes, a part at a time.

A remote file is opened once and gone through in order; to skip is to read. A transfer that dies is begun again a few
times, then it is an error with its cause. Only the schemes named here reach webdataset, which would run commands for
some others.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.stream import webdataset_io
from kd_core.errors import UsageError

PROGRAMS = {"http": "curl", "https": "curl", "gs": "gsutil", "ais": "ais"}
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
PLAIN_URL = re.compile(r"[a-z]+://[A-Za-z0-9][A-Za-z0-9.:-]*(/[A-Za-z0-9._~%+,=:@-]*)*")
RETRIES = 3
RETRY_SECONDS = 1.0  # then twice as long each time
PART = 1 << 20
CURL_SAYS = {
    6: "the host is not known",
    7: "no connection",
    18: "the transfer ended early",
    22: "the server answers with an error, as 404 (no such file)",
    28: "timed out",
    52: "the server sent nothing",
    56: "the connection broke",
}
FINAL = (3, 6, 22)  # of curl, which tries again by itself where a server says that it is busy


class _TransferError(Exception):
    """A transfer that died; `final` where another attempt would, too."""

    def __init__(self, why: str, final: bool) -> None:
        super().__init__(why)
        self.final = final


@dataclass(frozen=True)
class Location:
    """A cache's folder, as a path or as a URL.

    Raises:
        UsageError: a URL of another scheme than `PROGRAMS`, or with more in it than a host and plain path.
    """

    path: str

    def __post_init__(self) -> None:
        match = SCHEME.match(self.path)
        if match is None:
            return
        if (scheme := match[1]) not in PROGRAMS or not webdataset_io.known_scheme(scheme):
            raise UsageError(
                f"{self.path}: {scheme!r} is no place to read a cache from; wanted a folder, or "
                f"{', '.join(f'{name}://' for name in PROGRAMS)}. (A folder of such a name is ./{self.path}.)"
            )
        if not PLAIN_URL.fullmatch(self.path) or "/../" in self.path + "/":
            raise UsageError(
                f"{self.path}: wanted {scheme}://HOST/PATH of plain characters: no user, query, braces or brackets, "
                "which the program that opens it would act on."
            )

    @property
    def remote(self) -> bool:
        """Whether it lies behind a URL."""
        return SCHEME.match(self.path) is not None

    @property
    def folder(self) -> Path:
        """The folder, where it is one."""
        assert not self.remote
        return Path(self.path)

    def of(self, name: str) -> str:
        """A file of the cache, for messages, and for webdataset where the cache is remote."""
        return f"{self.path.rstrip('/')}/{name}" if self.remote else str(self.folder / name)

    def read(self, name: str, most: int) -> bytes:
        """The whole of a remote file.

        Raises:
            UsageError: it cannot be had, or has more than `most` bytes.
        """
        file = RemoteFile(self.of(name))
        try:
            data = file.read(0, most + 1)
        finally:
            file.close()
        if len(data) > most:
            raise UsageError(f"{file.url}: has more than {most} bytes; wanted at most so many. Is it another file?")
        return data


class RemoteFile:
    """One file behind a URL, gone through in order."""

    def __init__(self, url: str) -> None:
        self.url, self.stream, self.at, self.stopped = url, None, 0, False

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer where the file ends.

        Raises:
            UsageError: the transfer died, also when begun again.
        """
        for attempt in range(RETRIES + 1):
            try:
                return self._read(offset, size)
            except _TransferError as error:
                self.close()
                if error.final or self.stopped or attempt == RETRIES:
                    tried = f" ({attempt + 1} attempts)" if attempt else ""
                    raise UsageError(
                        f"{self.url}: cannot be read{tried}: {error}. Look whether it can be had at all, then run "
                        "the same again."
                    ) from None
                time.sleep(RETRY_SECONDS * 2**attempt)
        raise AssertionError

    def stop(self) -> None:
        """End the transfer, from any thread; who reads gets an error."""
        self.stopped = True
        webdataset_io.stop(self.stream)

    def close(self) -> None:
        """Close the stream; by the thread that reads."""
        if self.stream is not None:
            webdataset_io.close(self.stream)
        self.stream, self.at = None, 0

    def _read(self, offset: int, size: int) -> bytes:
        if self.at > offset:
            self.close()
        if self.stream is None:
            self.stream = self._opened()
        if self.stopped:
            raise _TransferError("it was stopped", True)
        while self.at < offset:
            skipped = len(self._part(min(PART, offset - self.at)))
            if not skipped:
                return b""
        parts: list[bytes] = []
        while size > 0 and (part := self._part(min(PART, size))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _opened(self) -> Any:
        try:
            return webdataset_io.opened(self.url)
        except FileNotFoundError:
            program = PROGRAMS[self.url.partition(":")[0]]
            raise _TransferError(f"the program {program!r}, which opens such URLs, is not installed", True) from None

    def _part(self, size: int) -> bytes:
        """The next bytes; none at the end of a whole file."""
        try:
            data = self.stream.read(size)  # pyright: ignore[reportOptionalMemberAccess]
        except OSError:  # webdataset's, of a program that ended badly
            data = b""
        self.at += len(data)
        if not data and (status := webdataset_io.exit_status(self.stream)):
            program = PROGRAMS[self.url.partition(":")[0]]
            says = CURL_SAYS.get(status, "") if program == "curl" else ""
            why = f"{program} ended with status {status} after {self.at} bytes{': ' * bool(says)}{says}"
            raise _TransferError(why, program == "curl" and status in FINAL)
        return data
