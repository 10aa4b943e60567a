"""Hashes of all inputs of a run. A run that repeats another compares them to see whether it reads the same inputs."""

import hashlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from experiments.base.parts import ExperimentParts
from kd_core.files import open_plain, sha256
from kd_core.hub import pin_commit, resolve_folder
from kd_core.students.starts.start import StudentInit

END_BYTES = 1 << 20  # bytes at each end of a weight file


def model_identity(folder: Path) -> str:
    """Returns the sha256 of a model's folder: all of its JSON files, and each weight file's size, first and last MiB.

    Two models differ in nearly all of their weights. The ends therefore distinguish them without reading gigabytes.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open_plain(path, "weights") as file:
            digest.update(file.read(END_BYTES))
            file.seek(max(0, size - END_BYTES))
            digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def student_folders(start: StudentInit, where: str = "student") -> dict[str, str]:
    """Returns all folders that a start reads, its base's and adapter's included, by their paths in the experiment."""
    folders, folder = dict[str, str](), start.folder
    for name in (field.name for field in fields(start)) if is_dataclass(start) else ():
        value: Any = getattr(start, name)
        if name == "base":
            folders |= student_folders(value, f"{where}.base")
        elif name in ("folder", "adapter") and value is not None:
            folders[f"{where}.{name}"] = value
    return folders or {f"{where}.folder": folder}


def input_hashes(experiment: ExperimentParts) -> dict[str, dict[str, str]]:
    """Returns path and sha256 of all that the experiment reads. The path of a hub id names the commit that was read.

    A cache's hash is that of its manifest, which holds the hashes of all its files.
    """
    inputs = {
        where: {"path": pin_commit(folder), "sha256": model_identity(resolve_folder(folder, where))}
        for where, folder in student_folders(experiment.student).items()
    }
    caches = {**experiment.training_caches(), **experiment.held_out_caches()}
    for where, shards in caches.items():
        inputs[f"{where}.path"] = {"path": shards.path, "sha256": shards.manifest.identity()}
    return inputs
