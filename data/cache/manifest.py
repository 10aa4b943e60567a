"""`manifest.json`: what a cache is, written last, so that its presence means that the cache is complete."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.cache.selection import Selection
from kd_core.errors import UsageError
from kd_core.files import read_json, write_json

FORMAT = "kd-workspace teacher cache"
VERSION = 2
TABLES = "tables.tar"
SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.tar")


@dataclass(frozen=True)
class Block:
    """A run of bytes of a shard, read and verified as one; `lengths` are its records' positions, in order."""

    bytes: int
    sha256: str
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """One tar of the cache: its blocks, one after the other, and the two empty records that end a tar."""

    name: str
    bytes: int
    sha256: str
    blocks: tuple[Block, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each record."""
        return tuple(length for block in self.blocks for length in block.lengths)


@dataclass(frozen=True)
class Audit:
    """What the codec changed over all positions, in nats of KL(original‖decoded), and in mass of the entries."""

    kl_mean: float
    kl_worst: float
    mass_error: float


@dataclass(frozen=True)
class Manifest:
    """A cache: who spoke, over which vocabulary, what was kept and how it is coded, and the shards.

    `plans` are what its exports were asked for (corpus, split, selection, teacher), one for each time it grew.
    """

    vocab_size: int
    tokenizer: str
    teacher: dict[str, Any]
    selection: Selection
    row_length: int
    codec: str
    audit: Audit
    statistics: dict[str, float]
    tables: dict[str, Any]
    plans: tuple[dict[str, Any], ...]
    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        """Number of records."""
        return sum(len(block.lengths) for shard in self.shards for block in shard.blocks)

    @property
    def positions(self) -> int:
        """Number of positions."""
        return sum(sum(block.lengths) for shard in self.shards for block in shard.blocks)

    @property
    def bytes(self) -> int:
        """Of shards and tables."""
        return int(self.tables["bytes"]) + sum(shard.bytes for shard in self.shards)

    def summary(self, folder: Path) -> str:
        """The cache in one line."""
        return (
            f"{folder}: {self.records} records, {self.positions} positions in {len(self.shards)} shards, "
            f"{self.bytes / self.positions:.1f} bytes a position; teacher NLL {self.statistics['teacher_nll']:.3f}, "
            f"mass of {self.selection.words()} {self.statistics['teacher_mass']:.3f}, "
            f"codec's KL {self.audit.kl_mean:.1e}"
        )

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        write_json(folder / "manifest.json", {"format": FORMAT, "version": VERSION, **asdict(self)})


def _shard(value: dict[str, Any]) -> Shard:
    name = str(value["name"])
    if not SHARD_NAME.fullmatch(name):
        raise ValueError(f"shard name {name!r} is none")
    blocks = tuple(Block(int(b["bytes"]), str(b["sha256"]), tuple(map(int, b["lengths"]))) for b in value["blocks"])
    return Shard(name, int(value["bytes"]), str(value["sha256"]), blocks)


def parse_manifest(value: dict[str, Any], path: str) -> Manifest:
    """A manifest from its JSON.

    Raises:
        UsageError: another format or version, or a field that is missing, unknown or none.
    """
    found = (value.pop("format", None), value.pop("version", None))
    if found != (FORMAT, VERSION):
        raise UsageError(f"{path}: format and version are {found}; wanted {(FORMAT, VERSION)}. Export the cache again.")
    try:
        selection = dict(value.pop("selection"))
        selection["tail_temperatures"] = tuple(selection["tail_temperatures"])
        parts: dict[str, Any] = {
            "selection": Selection(**selection),
            "audit": Audit(**value.pop("audit")),
            "plans": tuple(value.pop("plans")),
            "shards": tuple(_shard(each) for each in value.pop("shards")),
        }
        return Manifest(**value, **parts)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: a field is missing, unknown or none ({error}). Export the cache again.") from None


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
    return parse_manifest(
        read_json(path, "the manifest of a teacher cache (made by launchers.export_teacher)"), str(path)
    )
