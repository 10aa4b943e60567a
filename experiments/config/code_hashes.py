"""Hashes of the code that a run could import, by file, and a checkout's uncommitted changes as a patch."""

import importlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from experiments.config import user_files
from kd_core.files import sha256, write_bytes, write_text
from kd_core.training.run_folder import RunFolder

PACKAGES = ("kd_core", "data", "experiments", "launchers")
ENDINGS = (".py", ".jinja", ".json")
ROOT = Path(__file__).parents[2]
MOST_PATCH = 1 << 22  # bytes
SECONDS = 20


def source_hashes() -> dict[str, str]:
    """Returns the sha256 of each file that our packages could import or read, by path."""
    hashes = dict[str, str]()
    for package in PACKAGES:
        folder = Path(importlib.import_module(package).__path__[0])
        for path in sorted(folder.rglob("*")):
            relative_path = path.relative_to(folder)
            if path.suffix in ENDINGS and not any(part.startswith(".") for part in relative_path.parts):
                hashes[f"{package}/{relative_path.as_posix()}"] = sha256(path)
    return hashes


def code_facts(repeats: Path | None = None) -> dict[str, Any]:
    """Returns the code facts that a start records: hashes of our files, and of the user's files by path.

    A run that repeats another also keeps the paths and hashes of that run's user files.
    """
    repeated_files = RunFolder(repeats).last_facts().get("user_files", {}) if repeats else {}
    files = {
        path: {"path": f"{file.place}/{path}", "sha256": digest}
        for file in user_files.loaded_files()
        for path, digest in file.hashes().items()
        if Path(file.path).is_file()  # false for a file that comes out of a record
    }
    return {"sources": source_hashes(), "user_files": {**repeated_files, **files}}


def write_code(attempt: Path) -> None:
    """Writes the texts of user files and the uncommitted changes of our code beside the facts of a start."""
    for file in user_files.loaded_files():
        for path, text in file.texts.items():
            (target := attempt / "user_files" / path).parent.mkdir(parents=True, exist_ok=True)
            write_text(target, text)
    if patch := _uncommitted():
        notice = f"\n# Cut here: the patch has {len(patch)} bytes.\n".encode() if len(patch) > MOST_PATCH else b""
        write_bytes(attempt / "changes.diff", patch[:MOST_PATCH] + notice)


def _uncommitted() -> bytes:
    """Returns a patch from the commit to the files of our packages, also untracked ones. Without git it is empty."""
    if not (ROOT / ".git").exists():
        return b""
    paths = [f":(glob){package}/**/*{ending}" for package in PACKAGES for ending in ENDINGS]
    with tempfile.TemporaryDirectory() as folder:
        # A temporary index lists the untracked files, so that the checkout's own index stays as it is.
        index = Path(folder) / "index"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        try:
            shutil.copy(ROOT / _git(environment, "rev-parse", "--git-path", "index").decode().strip(), index)
            environment["GIT_INDEX_FILE"] = str(index)
            _git(environment, "add", "--intent-to-add", "--", *PACKAGES)
            return _git(environment, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--", *paths)
        except (OSError, subprocess.SubprocessError):
            return b""


def _git(environment: dict[str, str], *arguments: str) -> bytes:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, timeout=SECONDS, check=True, env=environment).stdout
