"""Files that are complete or absent (write beside, flush to disk, rename), and folders that one process owns."""

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
import tempfile
import time
from collections.abc import Generator
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from kd_core.errors import UsageError

log = logging.getLogger("kd")
OWNER_GRACE_SECONDS = 3.0  # seconds
# Errors of file systems that cannot lock files or flush folders.
UNSUPPORTED_ERRNOS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})
# Bytes of a text that is parsed in one piece. Parsed JSON takes up to some twenty times as much memory.
MAX_TEXT_BYTES = 1 << 25


def open_no_follow(path: str, flags: int) -> int:
    """Opens a file, as the `opener` of `open`, but no link and no pipe without a reader.

    A link in an untrusted folder would redirect our writes elsewhere. Opening such a pipe would block.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def write_bytes(path: Path, payload: bytes) -> None:
    """Writes `payload` to `path` so that a reader sees the old file or the whole new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb", opener=open_no_follow) as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync_folder(folder: Path) -> None:
    """Flushes the entries of `folder` to disk, so that they survive a crash, where its file system supports that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode())


def json_text(value: Any) -> str:
    """Returns sorted, indented JSON, so that equal values give equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes `json_text` of a value as `write_bytes` does."""
    write_text(path, json_text(value))


def printable(path: Path) -> str:
    """Returns a path as text that any locale can print: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def is_plain_file(path: Path) -> bool:
    """Returns True for a regular file, and False for a device, pipe or folder. A link counts as its target."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # a name with a zero byte, or one that is too long
        return False


@contextlib.contextmanager
def damage_as_usage_error(
    path: object, expected: str, then: str = "Restore it, or take another one"
) -> Generator[None]:
    """Turns any exception that reading an untrusted file raises into one `UsageError`.

    Args:
        path: the file, for the message.
        expected: what the file should be.
        then: what the user should do.

    Raises:
        UsageError: the block raised an exception that is neither a `UsageError` nor an `OSError`.
    """
    try:
        yield
    except (UsageError, OSError):
        raise
    except Exception as error:  # a library may raise anything at bytes that its authors did not foresee
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UsageError(f"{path}: damaged ({reason}), wanted {expected}. {then}.") from None


def open_plain(path: Path, expected: str) -> BufferedReader:
    """Opens an untrusted file for reading. `expected` describes the file in errors.

    Raises:
        UsageError: it is missing, or no regular file.
    """
    if not is_plain_file(path):
        problem = "no file that can be read as one" if path.exists() else "no such file"
        raise UsageError(f"{printable(path)}: {problem}, wanted {expected}. Check the path.")
    return path.open("rb")


def read_text(path: Path, expected: str, most: int = MAX_TEXT_BYTES) -> str:
    """Reads an untrusted text. `expected` describes the file in errors.

    Raises:
        UsageError: the file is missing, is no regular file, has more than `most` bytes, or is not UTF-8.
    """
    with open_plain(path, expected) as file:
        if (size := path.stat().st_size) > most:
            raise UsageError(f"{path}: has {size} bytes; at most {most} are read. Wanted {expected}. Restore it.")
        return _decode(file.read(most), path, expected)


def _decode(payload: bytes, path: object, expected: str) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error}), wanted {expected}. Restore or remake it.") from None


def read_json(path: Path, expected: str, most: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """Reads a JSON object from an untrusted file. `expected` describes the file in errors.

    Raises:
        UsageError: as for `read_text`, or the text is not JSON, or not an object.
    """
    return _parse_object(read_text(path, expected, most), path, expected)


def parse_json(payload: bytes, path: object, expected: str) -> dict[str, Any]:
    """Parses the bytes of an untrusted JSON object. `path` and `expected` describe them in errors.

    Raises:
        UsageError: they are not UTF-8, not JSON, or not an object.
    """
    return _parse_object(_decode(payload, path, expected), path, expected)


def _parse_object(text: str, path: object, expected: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists nested too deep
        raise UsageError(f"{path}: not valid JSON ({error}), wanted {expected}. Restore or remake it.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: holds a {type(value).__name__}, wanted {expected} (a JSON object).")
    return cast(dict[str, Any], value)


def sha256(path: Path) -> str:
    """Returns the hexadecimal sha256 of a file, or raises the errors of `open_plain`."""
    with open_plain(path, "a file") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_fingerprint(paths: list[Path]) -> str:
    """Returns one sha256 over the names and bytes of several files, in the order of `paths`."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path.name) + f" {sha256(path)}\n".encode())
    return digest.hexdigest()


def new_folder_target(path: Path) -> Path:
    """Returns the place of a new folder `path`: the target if it is a link, so that nothing is deleted through it.

    Raises:
        UsageError: `path` is a file, or a link to a folder that is not empty.
    """
    place = path.resolve() if path.is_symlink() else path
    if place.exists() and not place.is_dir():
        raise UsageError(f"{path}: a file stands there; wanted a folder. Move it away.")
    if path.is_symlink() and place.is_dir() and any(place.iterdir()):
        raise UsageError(f"{path}: is a link to {place}, which holds something. Empty that folder, or remove the link.")
    return place


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Yields a temporary folder, renames it to `path` if the block succeeds, and removes it otherwise.

    Raises:
        UsageError: as for `new_folder_target`.
    """
    path = new_folder_target(path)
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


def cache_home() -> Path:
    """Returns the folder of what this user's programs can make again, also for a user without a home."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "kd-workspace"
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "kd-workspace"
    return Path(tempfile.gettempdir()) / f"kd-workspace-{os.getuid()}"


def flock(handle: int, how: int) -> None:
    """Locks an open file or folder as `fcntl.flock` does. On a file system without locks it only warns, once.

    Raises:
        BlockingIOError: another process has the lock, and `how` includes LOCK_NB.
    """
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            raise
        _warn_of_no_locks(os.strerror(error.errno or 0))


def try_lock(handle: int) -> bool:
    """Locks an open file for this process alone, and returns whether it could."""
    try:
        flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_owned(folder: Path) -> bool:
    """Checks whether a process owns `folder` now."""
    if not (folder / ".lock").exists():
        return False
    with open(folder / ".lock", "a+", opener=open_no_follow) as lock:
        return not try_lock(lock.fileno())


@contextlib.contextmanager
def own_folder(folder: Path) -> Generator[None]:
    """Owns `folder` while the block runs. The kernel releases the lock when the process dies, however it dies.

    Waits `OWNER_GRACE_SECONDS` seconds for an owner that is about to end.

    Raises:
        UsageError: another process owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", opener=open_no_follow) as lock:
        deadline = time.monotonic() + OWNER_GRACE_SECONDS
        while not try_lock(lock.fileno()):
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
