"""The files below a folder, in an order that is the same on every machine, with counts of all that is left out."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kd_core.errors import UsageError
from kd_core.files import printable

log = logging.getLogger("kd")
HIDDEN, REPEATED, SPECIAL = "hidden", "link to a folder that is already read", "device or pipe"


@dataclass
class FolderFiles:
    """The files to read, and the number of those left out by ending or by reason."""

    root: Path
    files: list[Path] = field(default_factory=list[Path])
    left_out: Counter[str] = field(default_factory=Counter[str])

    def summary(self) -> str:
        """Describes what is left out, the most frequent reason first. Empty where nothing is."""
        counts = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{number} {reason}" for reason, number in counts)

    def log_left_out(self, role: str) -> None:
        """Logs one line about what is left out, if anything is. `role` names the folder, as `corpus`."""
        if self.left_out:
            log.info("%s %s: %d left out: %s", role, printable(self.root), self.left_out.total(), self.summary())


def _by_bytes(path: Path) -> list[bytes]:
    """Returns a sort key of a path that is the same in every locale."""
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
    """A walk through a folder: real folders first, then links to folders that it has not visited."""

    def __init__(self, root: Path, is_wanted: Callable[[Path], bool]) -> None:
        self.result, self.is_wanted = FolderFiles(root), is_wanted
        self.links: list[Path] = []
        # The folders above count as visited: a link to one of them would be a loop.
        self.visited = {self._identity(folder) for folder in root.resolve().parents}

    def _identity(self, folder: Path) -> tuple[int, int]:
        status = folder.stat()
        return status.st_dev, status.st_ino

    def _folder(self, folder: Path) -> None:
        if (identity := self._identity(folder)) in self.visited:
            self.result.left_out[REPEATED] += 1
            return
        self.visited.add(identity)
        for entry in _entries(folder):
            self._entry(Path(entry.path), entry)

    def _entry(self, path: Path, entry: os.DirEntry[str]) -> None:
        if entry.name.startswith("."):
            self.result.left_out[HIDDEN] += 1
        elif entry.is_symlink() and not path.exists():
            raise UsageError(
                f"{printable(path)}: a link to something that does not exist. Restore it, or delete the link."
            )
        elif entry.is_symlink() and entry.is_dir():
            self.links.append(path)
        elif entry.is_dir():
            self._folder(path)
        elif not self.is_wanted(path):
            self.result.left_out[_ending(entry.name)] += 1
        elif not entry.is_file():
            self.result.left_out[SPECIAL] += 1
        else:
            self.result.files.append(path)

    def run(self) -> FolderFiles:
        self._folder(self.result.root)
        while self.links:
            self._folder(self.links.pop(0))
        self.result.files.sort(key=_by_bytes)
        return self.result


def find_files(root: Path, is_wanted: Callable[[Path], bool]) -> FolderFiles:
    """Finds all files below a folder for which `is_wanted` holds.

    Links to folders are followed, and each folder is read once. Hidden files and folders are left out.

    Raises:
        UsageError: a folder cannot be read, or a link leads nowhere.
    """
    return _Walk(root, is_wanted).run()
