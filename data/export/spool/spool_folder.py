"""Where the spool of an export lies, which exports use it, and its end."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kd_core.errors import UsageError
from kd_core.files import content_fingerprint, flock, open_no_follow, try_lock

if TYPE_CHECKING:
    from data.export.extend import Growth
    from data.export.teacher_export import TeacherExport

VERSION = 1


def spool_folder(export: "TeacherExport", teacher: Path, out: Path | str, growth: "Growth | None") -> Path:
    """Returns the folder for the windows of an export. Its name stands for all that decides them.

    Of the corpus that is the names, sizes and times of its files, on this host. So a touched file is read anew.
    """
    corpus, settings = export.corpus, asdict(export)
    names = ("train_tokens", "validation_tokens", "row_length", "overlap", "validation_share", "seed")
    files = [(str(path), (facts := path.stat()).st_size, facts.st_mtime_ns) for path in corpus.files()]
    texts = [path for ending in ("json", "jinja") for path in sorted(teacher.rglob(f"*.{ending}"))]
    grown_from = growth and {split: manifest.identity() for split, manifest in growth.manifests.items()}
    # Exports that share a folder for spools each have one there, or the first to finish would remove that of another.
    place = str(out) if _is_url(out) else str(Path(out).resolve())
    decisive = [
        *(settings[name] for name in names), settings["corpus"], files, grown_from, content_fingerprint(texts), place,
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps([VERSION, *decisive], default=str).encode()).hexdigest()[:16]
    if export.spool is not None:
        return Path(export.spool) / key
    return (_host_folder() if _is_url(out) else _beside(Path(out))) / key


def _is_url(out: Path | str) -> bool:
    return re.match(r"[a-z0-9]+:/", str(out)) is not None  # also as a path


def _host_folder() -> Path:
    """Returns the folder of this user for the spools of exports into buckets.

    Raises:
        UsageError: somebody else has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"kd-spool-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise UsageError(f"{folder}: not a folder of yours, wanted one for the tokenised corpus. Set TMPDIR.")
    return folder


class SpoolUsers:
    """Counts the exports of this host that write to one `out`, by a lock that they share.

    A folder has one export at a time, so only buckets need the lock.
    """

    def __init__(self, lock: int | None) -> None:
        self._lock = lock

    def is_last(self) -> bool:
        """Checks whether no other export uses the spool. To be asked at the end: this one no longer counts then."""
        return self._lock is None or try_lock(self._lock)


@contextlib.contextmanager
def spool_users(out: Path | str) -> Generator[SpoolUsers]:
    """Counts this export as a user of its spool while the block runs. Waits for one that removes its own.

    Raises:
        UsageError: somebody else has made the host's folder for spools.
    """
    if not _is_url(out):
        yield SpoolUsers(None)
        return
    path = _host_folder() / f"{hashlib.sha256(str(out).encode()).hexdigest()[:16]}.users"
    with open(path, "a+", opener=open_no_follow) as lock:
        flock(lock.fileno(), fcntl.LOCK_SH)
        yield SpoolUsers(lock.fileno())


def _beside(out: Path) -> Path:
    out = out.absolute()  # "." has no name
    return out.with_name(f"{out.name}.spool")


def remove_spool(folder: Path, out: Path | str) -> None:
    """Removes the spool of a complete export, and spools beside `out` that other settings or files have left there."""
    beside = _beside(Path(out))
    if folder.parent != beside:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in beside.glob("[0-9a-f]" * 16):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # files of somebody else are there
        beside.rmdir()
