"""The files of a checkpoint: which ones, and whether their bytes are those that were written."""

import re
from collections.abc import Callable
from pathlib import Path

from kd_core.errors import UsageError
from kd_core.files import damaged, is_plain_file, read_json, sha256
from kd_core.json_fields import LARGEST, digest, fields, integer, shown

HASHES = "files.json"
TENSORS = "tensors_*.safetensors"
OWN_FILES = ("progress.json", "frozen.json", "config.json")  # of no rank
FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


def described(files: list[Path]) -> dict[str, dict[str, int | str]]:
    """Bytes and sha256 of files, by their names."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}


def damage(folder: Path, share: slice = slice(None), beat: Callable[[], None] = lambda: None) -> list[str]:
    """Lists the faults of a checkpoint's files, none if it is whole. Reads `share` of them, and all of their sizes."""
    try:
        wanted = _hashes(folder / HASHES)
    except UsageError as error:
        return [str(error)]
    wrong = [f"{HASHES} does not name {path.name}" for path in folder.glob(TENSORS) if path.name not in wanted]
    for name, (size, digest_wanted) in sorted(wanted.items())[share]:
        beat()
        file = folder / name
        if not is_plain_file(file):
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != size:
            wrong.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif sha256(file) != digest_wanted:
            wrong.append(f"{name} has other bytes than were written (sha256)")
    return wrong


def _hashes(path: Path) -> dict[str, tuple[int, str]]:
    """By the names of a checkpoint's files, how many bytes they have, and their sha256."""
    with damaged(path, "the hashes of a checkpoint"):
        found: dict[str, tuple[int, str]] = {}
        for name, value in read_json(path, "the hashes of a checkpoint").items():
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{shown(name)} is no plain name of a file")
            facts = fields(value, name, ("bytes", "sha256"))
            found[name] = integer(facts["bytes"], "bytes", 0, LARGEST), digest(facts["sha256"], "sha256")
        if missing := sorted({*OWN_FILES} - found.keys()):
            raise ValueError(f"names no {missing[0]}")
        return found
