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
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from kd_core.errors import UsageError

log = logging.getLogger("kd")
GRACE = 3.0
# What file systems answer that cannot lock files or flush folders.
CANNOT = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})


def write_bytes(path: Path, payload: bytes) -> None:
    """Write `payload` to `path` so that a reader sees the old file or the whole new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
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


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; `what` names it in the error.

    Raises:
        UsageError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file, wanted {what}. Check the path.") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists in lists
        raise UsageError(f"{path}: not valid JSON ({error}), wanted {what}. Restore or remake it.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: holds a {type(value).__name__}, wanted {what} (a JSON object).")
    return cast(dict[str, Any], value)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_fingerprint(paths: list[Path]) -> str:
    """One sha256 over several files' names and bytes, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Fill a temporary folder; it becomes `path` by rename when the block ends well, and is removed otherwise."""
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
    with (folder / ".lock").open("a+") as lock:
        return not _try_lock(lock.fileno())


@contextlib.contextmanager
def owned(folder: Path) -> Generator[None]:
    """Own `folder` while the block runs; the kernel lets go of it when the process dies, however it dies.

    Waits `GRACE` seconds for an owner that is on its way out.

    Raises:
        UsageError: another process owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
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
