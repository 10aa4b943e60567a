"""What a run was made from, as hashes: by them a run that repeats another knows whether it reads the same."""

import hashlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_core.files import open_plain, sha256
from kd_core.hub import pin_commit, resolve_folder
from kd_core.students.starts.start import StudentInit

if TYPE_CHECKING:
    from experiments.base.experiment import Experiment

ENDS = 1 << 20  # bytes


def model_identity(folder: Path) -> str:
    """sha256 of a model's folder: its JSON files, and of each weight file the size and the first and last MiB.

    Two models differ in nearly all of their weights, so the ends tell them apart without reading gigabytes.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open_plain(path, "weights") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


def student_folders(start: StudentInit, where: str = "student") -> dict[str, str]:
    """All folders that a start reads, by their paths in the experiment: its own, its base's, an adapter's."""
    found, folder = dict[str, str](), start.folder
    for name in (field.name for field in fields(start)) if is_dataclass(start) else ():
        value: Any = getattr(start, name)
        if name == "base":
            found |= student_folders(value, f"{where}.base")
        elif name in ("folder", "adapter") and value is not None:
            found[f"{where}.{name}"] = value
    return found or {f"{where}.folder": folder}


def identities(experiment: "Experiment") -> dict[str, dict[str, str]]:
    """Path and sha256 of all that is read: of a cache, of its manifest, which has those of all its files.

    A hub id stands with the commit that was read.
    """
    found = {
        where: {"path": pin_commit(folder), "sha256": model_identity(resolve_folder(folder, where))}
        for where, folder in student_folders(experiment.student).items()
    }
    caches = {**experiment.training_caches(), **experiment.held_out_caches()}
    for where, shards in caches.items():
        found[f"{where}.path"] = {"path": shards.path, "sha256": shards.manifest.identity()}
    return found
