"""The code that a run could import, as hashes by file; and what a checkout has beyond its commit, as a patch."""

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
    found = dict[str, str]()
    for package in PACKAGES:
        folder = Path(importlib.import_module(package).__path__[0])
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.suffix in ENDINGS and not any(part.startswith(".") for part in inside.parts):
                found[f"{package}/{inside.as_posix()}"] = sha256(path)
    return found


def code_facts(repeats: Path | None = None) -> dict[str, Any]:
    """Returns what the record of a start holds of its code: hashes of our files, and of the user's by path.

    A run that repeats another goes on to hold where the user's files of that one stand.
    """
    known = RunFolder(repeats).last_facts().get("user_files", {}) if repeats else {}
    files = {
        path: {"path": f"{file.place}/{path}", "sha256": digest}
        for file in user_files.loaded()
        for path, digest in file.hashes().items()
        if Path(file.path).is_file()  # and is not itself out of a record
    }
    return {"sources": source_hashes(), "user_files": {**known, **files}}


def keep_code(attempt: Path) -> None:
    """Write beside the facts of a start the texts of user files, and what our code has beyond its commit."""
    for file in user_files.loaded():
        for path, text in file.texts.items():
            (target := attempt / "user_files" / path).parent.mkdir(parents=True, exist_ok=True)
            write_text(target, text)
    if patch := _uncommitted():
        rest = f"\n# Cut here: the patch has {len(patch)} bytes.\n".encode() if len(patch) > MOST_PATCH else b""
        write_bytes(attempt / "changes.diff", patch[:MOST_PATCH] + rest)


def _uncommitted() -> bytes:
    """Returns a patch from the commit to the files of our packages, untracked ones included; nothing without git."""
    if not (ROOT / ".git").exists():
        return b""
    paths = [f":(glob){package}/**/*{ending}" for package in PACKAGES for ending in ENDINGS]
    with tempfile.TemporaryDirectory() as folder:
        # Another index takes note of untracked files, so that the checkout's own stays as it is.
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
