"""Storage of a cache's files: a folder of this machine, or a URL. A new kind of storage is one more class.

    storage_at(path) ─► Storage: size, names, read a whole file or a range, start reading a range, write, delete

Object storage and web servers are in `object_storage.py`, datasets of the hub in `hub_storage.py`.
"""

import os
import re
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from kd_core.errors import UsageError
from kd_core.files import open_no_follow

SCHEMES = ("s3", "gs", "az", "hf", "http", "https")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
PLAIN_URL = re.compile(r"[a-z0-9]+://[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9._~%+,=:@-]*)*")
PARTIAL = ".partial"  # ends the name of a file that is being written
RETRY_SECONDS = 30.0  # seconds in which a failed request is tried again, unless a caller states others


class Storage(Protocol):
    """The files of one cache, by their names. All methods may be called from any thread.

    `read_ahead` is the number of bytes worth reading before they are needed, 0 where the system reads ahead itself.
    """

    read_ahead: int

    def url(self, name: str) -> str:
        """Returns the path or URL of a file, as messages show it."""
        ...

    def size(self, name: str) -> int | None:
        """Returns a file's size in bytes, or None if there is no such file.

        Raises:
            UsageError: the storage does not answer, or refuses.
        """
        ...

    def names(self) -> list[str]:
        """Returns the sorted names of the files at the top level.

        Raises:
            UsageError: this kind of storage cannot list files, does not answer, or refuses.
        """
        ...

    def read(self, name: str, most: int) -> bytes:
        """Returns a whole file.

        Raises:
            UsageError: the file is missing, cannot be read, or has more than `most` bytes.
        """
        ...

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset` on, fewer where the file ends.

        Raises:
            UsageError: the file is missing or cannot be read.
        """
        ...

    def start_read(self, name: str, offset: int, size: int) -> "Future[bytes]":
        """Starts a `read_range` whose result, or error, is in the future. Cancelling the future ends the read."""
        ...

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file atomically: it is complete or absent, whatever happens.

        Raises:
            UsageError: this kind of storage cannot be written, does not answer, or refuses.
        """
        ...

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there.

        Raises:
            UsageError: this kind of storage cannot be written, does not answer, or refuses.
        """
        ...

    def clean(self) -> None:
        """Deletes what interrupted writes left behind."""
        ...


def is_url(path: str) -> bool:
    return SCHEME.match(path) is not None


def child(path: Path | str, name: str) -> Path | str:
    """Returns the path or URL of a folder inside another one."""
    return f"{str(path).rstrip('/')}/{name}" if is_url(str(path)) else Path(path) / name


def storage_at(path: Path | str, retry_seconds: float = RETRY_SECONDS) -> Storage:
    """Returns the storage that holds the cache at a path or URL. Nothing is opened yet.

    Args:
        path: a folder, or a URL of one of `SCHEMES`.
        retry_seconds: seconds in which a failed request is tried again.

    Raises:
        UsageError: the URL's scheme is not in `SCHEMES`, or it holds more than a host and a plain path.
    """
    if not is_url(url := str(path)):
        return LocalStorage(Path(path))
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES:
        raise UsageError(
            f"a URL of {scheme:.40}: {scheme!r:.40} is no place to read a cache from; wanted a folder, or "
            f"{', '.join(f'{name}://' for name in SCHEMES)}. (Write ./ before a folder of such a name.)"
        )
    if not PLAIN_URL.fullmatch(url) or "/../" in url + "/":
        raise UsageError(
            f"a URL of {scheme}: not a plain one; wanted {scheme}://HOST/PATH of letters, digits and ._~%+,=:@- "
            "without user, password or query. Credentials come from the environment (docs/storage.md)."
        )
    # Imported here, because most runs read folders.
    from data.storage.hub_storage import HubStorage  # noqa: PLC0415
    from data.storage.object_storage import BucketStorage, WebStorage  # noqa: PLC0415

    kind = {"hf": HubStorage, "http": WebStorage, "https": WebStorage}.get(scheme, BucketStorage)
    return kind(url.rstrip("/"), retry_seconds)


def too_large(url: str, most: int, size: int) -> UsageError:
    """Returns the error of a file that has more bytes than are read."""
    return UsageError(f"{url}: has {size} bytes, wanted at most {most}. Restore it, or export the cache again.")


def missing(url: str) -> UsageError:
    """Returns the error of a file that is not there."""
    return UsageError(f"{url}: no such file. Check the path, restore the file, or export the cache again.")


@contextmanager
def _readable(path: Path) -> Generator[None]:
    """Turns an error of the operating system into one that names the file.

    Raises:
        UsageError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise UsageError(
            f"{path}: cannot be read: {cause}. Check the disk or server that holds it and its permissions, then run "
            "the same command again."
        ) from None


class LocalStorage:
    """A folder of this machine."""

    read_ahead = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def url(self, name: str) -> str:
        return str(self.folder / name)

    def size(self, name: str) -> int | None:
        path = self.folder / name
        with _readable(path):
            return path.stat().st_size if path.is_file() else None

    def names(self) -> list[str]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in paths if path.suffix != PARTIAL and path.is_file())

    def read(self, name: str, most: int) -> bytes:
        size = self.size(name)
        if size is None:
            raise missing(self.url(name))
        if size > most:
            raise too_large(self.url(name), most, size)
        with _readable(self.folder / name):
            return (self.folder / name).read_bytes()

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        if self.size(name) is None:  # opening a pipe would block
            raise missing(self.url(name))
        with _readable(self.folder / name), (self.folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def start_read(self, name: str, offset: int, size: int) -> "Future[bytes]":
        future = Future[bytes]()
        try:
            future.set_result(self.read_range(name, offset, size))
        except Exception as error:  # raised where the result is wanted
            future.set_exception(error)
        return future

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{name}{PARTIAL}"
        with open(partial, "wb", opener=open_no_follow) as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.folder / name)

    def clean(self) -> None:
        for partial in self.folder.glob(f"*{PARTIAL}"):
            partial.unlink()

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
