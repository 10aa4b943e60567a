"""A folder of cache blocks on this machine's disk, so that a block is fetched from far away once.

Each block is a file named by its sha256, so a block of another content never answers. All processes of a machine share
the folder. A file appears by rename, when it is complete. Whoever reads one verifies it, as bytes from a server. The
blocks that were not used for the longest time are deleted when there are too many.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from kd_core.files import cache_home, open_no_follow, try_lock

log = logging.getLogger("kd")
AUTO = "auto"
OWN_FOLDER = "kd-workspace-blocks"  # in a folder that a user names, which may hold other files
BLOCK_FOLDER, BLOCK_NAME = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]{64}")
TEMPORARY_PREFIX, TEMPORARY = "block-", ".partial"
STALE_SECONDS = 3600.0  # age of a temporary file that a killed process has left
KEPT_SHARE = 0.9  # of the bound, after older blocks were deleted
LOCK_SECONDS = 5.0  # of waiting for a process that makes room
LOOKS = 32  # a process looks at the folder again after it has written this part of the bound


class _File(NamedTuple):
    used: float
    bytes: int
    path: str


def default_folder() -> Path:
    """Returns the folder of all caches of this user."""
    return cache_home() / "blocks"


def _is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY)


@functools.cache
def _warn_once(folder: Path, reason: str) -> None:
    log.warning("%s: blocks cannot be kept there (%s), so each epoch fetches them again", folder, reason)


class BlockCache:
    """Blocks by their sha256, of at most `most_bytes` in all, and of at most half of the disk that others leave."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self.unseen = most_bytes  # bytes written since the last look at the folder

    @classmethod
    def from_setting(cls, setting: str | None, most_bytes: int) -> "BlockCache | None":
        """Returns the cache in a subfolder of a folder, in the user's own (`auto`), or none."""
        if setting is None:
            return None
        return cls(default_folder() if setting == AUTO else Path(setting) / OWN_FOLDER, most_bytes)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def get(self, sha256: str, size: int) -> bytes | None:
        """Returns the bytes of a block, which the caller verifies, or None. Marks the block as used."""
        path = self.path(sha256)
        try:
            if path.stat().st_size != size:
                self.drop(sha256)
                return None
            data = path.read_bytes()
            os.utime(path)
        except OSError:  # it is not there, or was deleted by another process
            return None
        return data

    def drop(self, sha256: str) -> None:
        """Deletes a damaged block."""
        with contextlib.suppress(OSError):
            self.path(sha256).unlink(missing_ok=True)

    def put(self, sha256: str, data: bytes) -> None:
        """Keeps a verified block. A full disk or a folder that cannot be written is a warning."""
        path = self.path(sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(TEMPORARY, TEMPORARY_PREFIX, path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                Path(partial).rename(path)
            except BaseException:
                Path(partial).unlink()
                raise
            self.unseen += len(data)
            if self.unseen * LOOKS > self.most_bytes:
                self._make_room()
        except OSError as error:
            _warn_once(self.folder, os.strerror(error.errno or 0))
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                with contextlib.suppress(OSError):
                    self._make_room(is_full=True)

    def _make_room(self, *, is_full: bool = False) -> None:
        """Deletes the blocks that were not used for the longest time, and half of them on a full disk.

        One process at a time does.
        """
        with open(self.folder / ".lock", "a", opener=open_no_follow) as lock:
            deadline = time.monotonic() + LOCK_SECONDS
            while not try_lock(lock.fileno()):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)
            self.unseen = 0
            files = sorted(self._files())
            used = sum(file.bytes for file in files)
            left = used if is_full else used + shutil.disk_usage(self.folder).free
            most = min(self.most_bytes, left // 2)
            if used <= most:
                return
            for file in files:
                if used <= most * KEPT_SHARE:
                    break
                Path(file.path).unlink(missing_ok=True)
                used -= file.bytes

    def _files(self) -> list[_File]:
        """Returns all blocks, and deletes temporary files of killed processes. Other files are left alone."""
        files: list[_File] = []
        for folder in os.scandir(self.folder):
            if not BLOCK_FOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if BLOCK_NAME.fullmatch(entry.name):
                        files.append(_File(status.st_mtime, status.st_size, entry.path))
                    elif _is_temporary(entry.name) and status.st_mtime < time.time() - STALE_SECONDS:
                        Path(entry.path).unlink(missing_ok=True)
        return files
