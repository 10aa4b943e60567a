"""The files of a checkpoint, and checks of their sizes and hashes against those that were written."""

import re
from collections.abc import Callable
from pathlib import Path

from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, is_plain_file, read_json, sha256
from kd_core.json_fields import LARGEST, check_digest, check_integer, check_object, short_repr

HASHES = "files.json"
TENSORS = "tensors_*.safetensors"
COMMON_FILES = ("progress.json", "frozen.json", "config.json")  # written once, by the first rank
FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


def hash_files(files: list[Path]) -> dict[str, dict[str, int | str]]:
    """Returns the size in bytes and the sha256 of each file, by its name."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}


def find_damage(folder: Path, share: slice = slice(None), beat: Callable[[], None] = lambda: None) -> list[str]:
    """Lists the faults of a checkpoint's files, and nothing if it is undamaged.

    Only the files of `share`, a slice of their sorted names, are checked, so that ranks can divide the reading. `beat`
    is called before each of them.
    """
    try:
        recorded = _hashes(folder / HASHES)
    except UsageError as error:
        return [str(error)]
    wrong = [f"{HASHES} does not name {path.name}" for path in folder.glob(TENSORS) if path.name not in recorded]
    for name, (size, recorded_digest) in sorted(recorded.items())[share]:
        beat()
        file = folder / name
        if not is_plain_file(file):
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != size:
            wrong.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif sha256(file) != recorded_digest:
            wrong.append(f"{name} has bytes that differ from those written (sha256)")
    return wrong


def _hashes(path: Path) -> dict[str, tuple[int, str]]:
    """Reads the recorded size in bytes and sha256 of each file of a checkpoint, by its name."""
    with damage_as_usage_error(path, "the hashes of a checkpoint"):
        hashes: dict[str, tuple[int, str]] = {}
        for name, value in read_json(path, "the hashes of a checkpoint").items():
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{short_repr(name)} is not a plain file name")
            facts = check_object(value, name, ("bytes", "sha256"))
            hashes[name] = check_integer(facts["bytes"], "bytes", 0, LARGEST), check_digest(facts["sha256"], "sha256")
        if missing := sorted({*COMMON_FILES} - hashes.keys()):
            raise ValueError(f"names no {missing[0]}")
        return hashes
