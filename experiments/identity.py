"""What a run was made from, as hashes: by them a run that repeats another knows whether it reads the same."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from kd_core.files import sha256

if TYPE_CHECKING:
    from experiments.experiment import Experiment

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
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


def identities(experiment: "Experiment") -> dict[str, dict[str, str]]:
    """Path and sha256 of all that is read: of a cache, of its manifest, which has those of all its files."""
    student = experiment.student.folder
    found = {"student.folder": {"path": student, "sha256": model_identity(Path(student))}}
    caches = {**experiment.training_caches(), **experiment.held_out_caches()}
    for where, shards in caches.items():
        digest = hashlib.sha256(shards.manifest.as_json().encode()).hexdigest()
        found[f"{where}.path"] = {"path": shards.path, "sha256": digest}
    return found
