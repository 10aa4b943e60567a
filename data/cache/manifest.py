"""`manifest.json`: what a cache is, written last, so that its presence means that the cache is complete."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd_core.errors import UsageError
from kd_core.files import read_json, write_json

FORMAT = "kd-workspace teacher cache"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar of the cache; `lengths` are its records' positions, in order."""

    name: str
    bytes: int
    sha256: str
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A cache: who spoke, over which vocabulary, what was kept, and the shards.

    `plan` is what the export was asked for (corpus, split, selection, teacher), as it was written beside it.
    """

    vocab_size: int
    tokenizer: str
    teacher: dict[str, Any]
    top_k: int
    row_length: int
    codec: str
    statistics: dict[str, float]
    plan: dict[str, Any]
    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        """Number of records."""
        return sum(len(shard.lengths) for shard in self.shards)

    @property
    def positions(self) -> int:
        """Number of positions."""
        return sum(sum(shard.lengths) for shard in self.shards)

    def summary(self, folder: Path) -> str:
        """The cache in one line."""
        size = sum(shard.bytes for shard in self.shards) / self.positions
        return (
            f"{folder}: {self.records} records, {self.positions} positions in {len(self.shards)} shards, "
            f"{size:.0f} bytes a position; teacher NLL {self.statistics['teacher_nll']:.3f}, "
            f"mass of the top {self.top_k} {self.statistics['teacher_mass']:.3f}"
        )

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        write_json(folder / "manifest.json", {"format": FORMAT, "version": VERSION, **asdict(self)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache.

    Raises:
        UsageError: none there (the export has not ended), or of another format or version.
    """
    path = folder / "manifest.json"
    if not path.exists() and (folder / "plan.json").exists():
        raise UsageError(
            f"{folder}: the export has not ended (no manifest.json). Run the same export again to finish it."
        )
    value = read_json(path, "the manifest of a teacher cache (made by launchers.export_teacher)")
    found = (value.pop("format", None), value.pop("version", None))
    if found != (FORMAT, VERSION):
        raise UsageError(f"{path}: format and version are {found}; wanted {(FORMAT, VERSION)}.")
    try:
        shards = tuple(
            Shard(found["name"], found["bytes"], found["sha256"], tuple(found["lengths"]))
            for found in value.pop("shards")
        )
        return Manifest(**value, shards=shards)
    except (TypeError, KeyError) as error:
        raise UsageError(f"{path}: a field is missing or unknown ({error}). Export the cache again.") from None
