"""The files below a folder, in a stable order, and what of it is left out: nothing is dropped without a word."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kd_core.errors import UsageError
from kd_core.files import printable

log = logging.getLogger("kd")
HIDDEN, KNOWN, SPECIAL = "hidden", "link to a folder that is read already", "device or pipe"


@dataclass
class FolderFiles:
    """Files that are read, and how many are not, by ending or reason."""

    root: Path
    files: list[Path] = field(default_factory=list[Path])
    left_out: Counter[str] = field(default_factory=Counter[str])

    def summary(self) -> str:
        """Describes what is left out; empty where nothing is."""
        counts = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{number} {reason}" for reason, number in counts)

    def log_left_out(self, what: str) -> None:
        """One line, where something is left out."""
        if self.left_out:
            log.info("%s %s: %d left out: %s", what, printable(self.root), self.left_out.total(), self.summary())


def _by_bytes(path: Path) -> list[bytes]:
    """The order of paths, the same in every locale."""
    return [os.fsencode(part) for part in path.parts]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise UsageError(
            f"{printable(folder)}: the folder cannot be read ({error.strerror}). Make it readable, or move it away."
        ) from None


def _ending(name: str) -> str:
    return Path(name).suffix.lower() or "without an ending"


class _Walk:
    """A walk through a folder: real folders first, then links to folders that it has not come by."""

    def __init__(self, root: Path, is_wanted: Callable[[Path], bool]) -> None:
        self.found, self.is_wanted = FolderFiles(root), is_wanted
        self.links: list[Path] = []
        self.seen = {self._identity(folder) for folder in root.resolve().parents}  # a link to one of them is a loop

    def _identity(self, folder: Path) -> tuple[int, int]:
        status = folder.stat()
        return status.st_dev, status.st_ino

    def _folder(self, folder: Path) -> None:
        if (identity := self._identity(folder)) in self.seen:
            self.found.left_out[KNOWN] += 1
            return
        self.seen.add(identity)
        for entry in _entries(folder):
            self._entry(Path(entry.path), entry)

    def _entry(self, path: Path, entry: os.DirEntry[str]) -> None:
        if entry.name.startswith("."):
            self.found.left_out[HIDDEN] += 1
        elif entry.is_symlink() and not path.exists():
            raise UsageError(f"{printable(path)}: a link to what is not there. Restore that, or delete the link.")
        elif entry.is_symlink() and entry.is_dir():
            self.links.append(path)
        elif entry.is_dir():
            self._folder(path)
        elif not self.is_wanted(path):
            self.found.left_out[_ending(entry.name)] += 1
        elif not entry.is_file():
            self.found.left_out[SPECIAL] += 1
        else:
            self.found.files.append(path)

    def run(self) -> FolderFiles:
        self._folder(self.found.root)
        while self.links:
            self._folder(self.links.pop(0))
        self.found.files.sort(key=_by_bytes)
        return self.found


def files_below(root: Path, is_wanted: Callable[[Path], bool]) -> FolderFiles:
    """Finds all files below a folder that are wanted.

    Links to folders are followed, each folder once. Hidden folders are left out.

    Raises:
        UsageError: a folder cannot be read, or a link leads nowhere.
    """
    return _Walk(root, is_wanted).run()
