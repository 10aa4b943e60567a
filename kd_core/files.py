"""Files that are complete or absent: write beside, flush to disk, rename; and a folder that one process owns."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Generator
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from kd_core.errors import UsageError

log = logging.getLogger("kd")
GRACE = 3.0
# What file systems answer that cannot lock files or flush folders.
CANNOT = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})
MOST_TEXT = 1 << 25  # bytes of a text that is parsed as one; JSON takes up to some twenty times as much memory


def no_link(path: str, flags: int) -> int:
    """Open a file as `opener` of `open`, but neither a link, through which a folder of somebody else would have us
    write elsewhere, nor a pipe without a reader, which would be waited for.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def write_bytes(path: Path, payload: bytes) -> None:
    """Write `payload` to `path` so that a reader sees the old file or the whole new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb", opener=no_link) as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync_folder(folder: Path) -> None:
    """Have what is named in `folder` survive a crash of the machine, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def json_text(value: Any) -> str:
    """Sorted, indented JSON, so that equal values give equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `json_text`."""
    write_text(path, json_text(value))


def printable(path: Path) -> str:
    """The path as text that can be written everywhere: bytes that are not UTF-8 as escapes, whatever the locale."""
    return os.fsencode(path).decode(errors="backslashreplace")


def is_plain_file(path: Path) -> bool:
    """Returns True for a file that ends: no device, pipe or folder. A link counts as its target."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # a name with a zero byte, or one that is too long
        return False


@contextlib.contextmanager
def damaged(path: object, wanted: str, then: str = "Restore it, or take another one") -> Generator[None]:
    """Turn whatever reading somebody else's file raises into one message.

    Raises:
        UsageError: says where, what was found, what was wanted and what to do.
    """
    try:
        yield
    except (UsageError, OSError):
        raise
    except Exception as error:  # libraries raise what they like at bytes that nobody foresaw
        found = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UsageError(f"{path}: damaged ({found}), wanted {wanted}. {then}.") from None


def open_plain(path: Path, what: str) -> BufferedReader:
    """Open a file for reading that somebody else may have left there; `what` names it in the error.

    Raises:
        UsageError: it is missing, or no plain file.
    """
    if not is_plain_file(path):
        found = "no file that can be read as one" if path.exists() else "no such file"
        raise UsageError(f"{printable(path)}: {found}, wanted {what}. Check the path.")
    return path.open("rb")


def read_text(path: Path, what: str, most: int = MOST_TEXT) -> str:
    """Read a text that somebody else may have written; `what` names it in the error.

    Raises:
        UsageError: the file is missing, is no plain file, has more than `most` bytes, or is not UTF-8.
    """
    with open_plain(path, what) as file:
        if (size := path.stat().st_size) > most:
            raise UsageError(f"{path}: has {size} bytes; at most {most} are read. Wanted {what}. Restore it.")
        payload = file.read(most)
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error}), wanted {what}. Restore or remake it.") from None


def read_json(path: Path, what: str, most: int = MOST_TEXT) -> dict[str, Any]:
    """Read a JSON object; `what` names it in the error.

    Raises:
        UsageError: as for `read_text`, or the text is not JSON, or not an object.
    """
    try:
        value = json.loads(read_text(path, what, most))
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists in lists
        raise UsageError(f"{path}: not valid JSON ({error}), wanted {what}. Restore or remake it.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: holds a {type(value).__name__}, wanted {what} (a JSON object).")
    return cast(dict[str, Any], value)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file; errors as in `open_plain`."""
    with open_plain(path, "a file") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_fingerprint(paths: list[Path]) -> str:
    """One sha256 over several files' names and bytes, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path.name) + f" {sha256(path)}\n".encode())
    return digest.hexdigest()


def place_of_new_folder(path: Path) -> Path:
    """Returns where a new folder `path` is made: where it points if it is a link, through which nothing is deleted.

    Raises:
        UsageError: a file stands there, or a link to a folder with something in it.
    """
    place = path.resolve() if path.is_symlink() else path
    if place.exists() and not place.is_dir():
        raise UsageError(f"{path}: a file stands there; wanted a folder. Move it away.")
    if path.is_symlink() and place.is_dir() and any(place.iterdir()):
        raise UsageError(f"{path}: is a link to {place}, which holds something. Empty that folder, or remove the link.")
    return place


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Fill a temporary folder; it becomes `path` by rename when the block ends well, and is removed otherwise.

    Raises:
        UsageError: as for `place_of_new_folder`.
    """
    path = place_of_new_folder(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


@functools.cache
def _warn_of_no_locks(reason: str) -> None:
    log.warning("the file system has no locks (%s): nothing keeps two commands out of one folder. Start one.", reason)


def flock(handle: int, how: int) -> None:
    """Lock an open file or folder as `fcntl.flock` does; a file system without locks is warned of, once.

    Raises:
        BlockingIOError: another process has it, and `how` is not to wait.
    """
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
        _warn_of_no_locks(os.strerror(error.errno or 0))


def _try_lock(handle: int) -> bool:
    try:
        flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_owned(folder: Path) -> bool:
    """Whether a process owns `folder` now."""
    if not (folder / ".lock").exists():
        return False
    with open(folder / ".lock", "a+", opener=no_link) as lock:
        return not _try_lock(lock.fileno())


@contextlib.contextmanager
def owned(folder: Path) -> Generator[None]:
    """Own `folder` while the block runs; the kernel lets go of it when the process dies, however it dies.

    Waits `GRACE` seconds for an owner that is on its way out.

    Raises:
        UsageError: another process owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", opener=no_link) as lock:
        deadline = time.monotonic() + GRACE
        while not _try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                raise UsageError(
                    f"{folder}: another process (pid {owner}) is working here. "
                    "Wait for it to end, stop it, or name another folder."
                )
            time.sleep(0.1)
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield
