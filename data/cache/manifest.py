"""`manifest.json`: teacher, vocabulary, selection, codec, statistics, shards and hashes of a cache.

It is written last, so a cache with a manifest is complete. Every field is checked when it is read.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast, get_args

from data.cache.codec.header import MAX_POSITIONS
from data.cache.codec.levels import Codec
from data.cache.codec.rank_tables import MAX_VOCABULARY
from data.cache.selection import Selection
from data.cache.tar import END_OF_TAR
from kd_core.errors import UsageError
from kd_core.files import json_text, read_json, write_text
from kd_core.json_fields import (
    check_digest,
    check_integer,
    check_list,
    check_number,
    check_object,
    check_text,
    short_repr,
)

FORMAT = "kd-workspace teacher cache"
VERSION = 3  # version 2 has no `made`
MAX_MANIFEST_BYTES, MAX_TABLES_BYTES, MAX_BLOCK_BYTES, MAX_SHARD_BYTES = 1 << 28, 1 << 26, 1 << 29, 1 << 50
TABLES_FILE = "tables.tar"
PLAN_BEGINS, PLAN_ENDS = "text_begins_with", "text_ends_with"  # fields of a plan, present where the lists are not empty
SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.tar")


@dataclass(frozen=True)
class Block:
    """Consecutive bytes of a shard that are read and verified as one.

    `lengths` are the positions of its records, in order.
    """

    bytes: int
    sha256: str
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """One tar of the cache: its blocks one after the other, and the 1,024 zero bytes that end a tar."""

    name: str
    bytes: int
    sha256: str
    blocks: tuple[Block, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Returns the number of positions of each record."""
        return tuple(length for block in self.blocks for length in block.lengths)


@dataclass(frozen=True)
class Audit:
    """The codec's error over all positions: KL(original‖decoded) in nats, and the worst error of the entries' mass."""

    kl_mean: float
    kl_worst: float
    mass_error: float


@dataclass(frozen=True)
class Manifest:
    """A cache: teacher and vocabulary, what was kept and how it is coded, and the shards.

    `plans` are the plans of its exports (corpus, split, selection, teacher), one for each time it grew.
    `made` has the teacher and the corpora as they were named, the time and our version. It is not part of the identity.
    `unknown` lists what a converted cache lacks, since its source did not record it: `tail`, `tokenizer`, or
    `label_log_prob` (of labels that are no entry: an upper bound is stored).
    """

    vocab_size: int
    tokenizer: str
    teacher: dict[str, Any]
    selection: Selection
    row_length: int
    codec: Codec
    audit: Audit
    statistics: dict[str, float]
    tables: dict[str, Any]
    plans: tuple[dict[str, Any], ...]
    shards: tuple[Shard, ...]
    unknown: tuple[str, ...] = ()
    made: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def records(self) -> int:
        """Returns the number of records."""
        return sum(len(block.lengths) for shard in self.shards for block in shard.blocks)

    @property
    def positions(self) -> int:
        """Returns the number of positions."""
        return sum(sum(block.lengths) for shard in self.shards for block in shard.blocks)

    @property
    def text_begins_with(self) -> list[int]:
        """Returns the ids in front of each text that is no conversation, such as the BOS."""
        return next((plan[PLAN_BEGINS] for plan in self.plans if PLAN_BEGINS in plan), [])

    @property
    def bytes(self) -> int:
        """Returns the bytes of shards and tables."""
        return int(self.tables["bytes"]) + sum(shard.bytes for shard in self.shards)

    def summary(self, folder: Path) -> str:
        """Describes the cache in one line."""
        return (
            f"{folder}: {self.records} records, {self.positions} positions in {len(self.shards)} shards, "
            f"{self.bytes / self.positions:.1f} bytes a position; teacher NLL {self.statistics['teacher_nll']:.3f}, "
            f"mass of {self.selection.words()} {self.statistics['teacher_mass']:.3f} over scored "
            f"positions, codec's KL {self.audit.kl_mean:.1e}"
        )

    def as_json(self) -> str:
        """Returns the text of `manifest.json`."""
        return json_text({"format": FORMAT, "version": VERSION, **asdict(self)})

    def identity(self) -> str:
        """Returns the sha256 of all fields but `made`.

        It identifies the whole cache, because the manifest has the hashes of all its files. It is computed on the text
        that version 2 wrote, so a cache of that version keeps its identity.
        """
        fixed = {"format": FORMAT, "version": 2, **asdict(self)}
        del fixed["made"]
        return hashlib.sha256(json_text(fixed).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`."""
        write_text(folder / "manifest.json", self.as_json())


def made_now(teacher: str, corpora: Sequence[str]) -> dict[str, Any]:
    """Returns the field `made` of a manifest: teacher and corpora as the user named them, the time, and our version."""
    try:
        release = metadata.version("kd-workspace")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        release = "(not installed)"
    return {
        "teacher": teacher,
        "corpora": list(corpora),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": f"kd-workspace {release}",
    }


def _shard(value: Any) -> Shard:
    shard = check_object(value, "a shard", ("blocks", "bytes", "name", "sha256"))
    name = check_text(shard["name"], "a shard's name")
    if not SHARD_NAME.fullmatch(name) or name == TABLES_FILE:
        raise ValueError(f"a shard's name is {short_repr(name)}; wanted a plain one, as shard-000000.tar")
    blocks = tuple(_block(block, name) for block in check_list(shard["blocks"], f"{name}: blocks"))
    size = check_integer(shard["bytes"], f"{name}: bytes", 1, MAX_SHARD_BYTES)
    if size != (expected := sum(block.bytes for block in blocks) + len(END_OF_TAR)):
        raise ValueError(f"{name}: has {size} bytes; its blocks and the tar's end have {expected}")
    return Shard(name, size, check_digest(shard["sha256"], f"{name}: sha256"), blocks)


def _block(value: Any, name: str) -> Block:
    block = check_object(value, f"{name}: a block", ("bytes", "lengths", "sha256"))
    lengths = check_list(block["lengths"], f"{name}: lengths")
    if not lengths:
        raise ValueError(f"{name}: a block has no records")
    return Block(
        check_integer(block["bytes"], f"{name}: a block's bytes", 1, MAX_BLOCK_BYTES),
        check_digest(block["sha256"], f"{name}: a block's sha256"),
        tuple(check_integer(length, f"{name}: a record's positions", 1, MAX_POSITIONS) for length in lengths),
    )


def parse_selection(value: Any) -> Selection:
    """Builds a selection from its JSON, with every field checked."""
    limits = check_object(value, "selection", (f.name for f in dataclass_fields(Selection)))
    return Selection(
        top_k=check_integer(limits["top_k"], "selection.top_k", 0, 65535),
        min_prob=check_number(limits["min_prob"], "selection.min_prob"),
        mass=check_number(limits["mass"], "selection.mass"),
        draws=check_integer(limits["draws"], "selection.draws", 0, 65535),
        proposal_temperature=check_number(limits["proposal_temperature"], "selection.proposal_temperature"),
        tail_temperatures=tuple(
            check_number(temperature, "selection.tail_temperatures")
            for temperature in check_list(limits["tail_temperatures"], "selection.tail_temperatures")
        ),
    )


def _audit(value: Any) -> Audit:
    errors = check_object(value, "audit", (f.name for f in dataclass_fields(Audit)))
    return Audit(**{name: check_number(error, f"audit.{name}") for name, error in errors.items()})


def _tables(value: Any) -> dict[str, Any]:
    tables = check_object(value, "tables", ("bytes", "sha256"))
    check_integer(tables["bytes"], "tables.bytes", 1, MAX_TABLES_BYTES)
    check_digest(tables["sha256"], "tables.sha256")
    return tables


def _statistics(value: Any) -> dict[str, float]:
    statistics = {
        name: check_number(mean, f"statistics.{name}") for name, mean in check_object(value, "statistics").items()
    }
    if missing := {"teacher_nll", "teacher_mass", "entries", "scored"} - set(statistics):
        raise ValueError(f"statistics: {min(missing)} is missing")
    return statistics


def _plan(value: Any) -> dict[str, Any]:
    plan = check_object(value, "a plan")
    for name in (PLAN_BEGINS, PLAN_ENDS):
        for token_id in check_list(plan.get(name, []), name):
            check_integer(token_id, name, 0, MAX_VOCABULARY - 1)
    return plan


def _codec(value: Any) -> Codec:
    if check_text(value, "codec") not in get_args(Codec):
        raise ValueError(f"codec: {short_repr(value)}; wanted one of {', '.join(get_args(Codec))}")
    return value


def _manifest(value: dict[str, Any], version: int) -> Manifest:
    added_since = {"made"} if version == 2 else set[str]()
    manifest = check_object(value, "it", {f.name for f in dataclass_fields(Manifest)} - added_since)
    shards = tuple(_shard(shard) for shard in check_list(manifest["shards"], "shards"))
    names = [shard.name for shard in shards]
    if len(set(names)) != len(names):
        raise ValueError(f"shards: {max(names, key=names.count)} stands twice")
    return Manifest(
        vocab_size=check_integer(manifest["vocab_size"], "vocab_size", 1, MAX_VOCABULARY),
        tokenizer=check_text(manifest["tokenizer"], "tokenizer"),
        teacher=check_object(manifest["teacher"], "teacher"),
        selection=parse_selection(manifest["selection"]),
        row_length=check_integer(manifest["row_length"], "row_length", 1, MAX_POSITIONS),
        codec=_codec(manifest["codec"]),
        audit=_audit(manifest["audit"]),
        statistics=_statistics(manifest["statistics"]),
        tables=_tables(manifest["tables"]),
        plans=tuple(_plan(plan) for plan in check_list(manifest["plans"], "plans")),
        shards=shards,
        unknown=tuple(check_text(name, "unknown") for name in check_list(manifest["unknown"], "unknown")),
        made=check_object(manifest.get("made", {}), "made"),
    )


def parse_manifest(value: Any, path: str) -> Manifest:
    """Builds a manifest from its JSON. Every field must have its exact type and be in bounds.

    Raises:
        UsageError: the format or version is another one, or a field is missing, unknown or out of bounds.
    """
    rest = dict(cast(dict[str, Any], value)) if isinstance(value, dict) else {}
    kind, version = rest.pop("format", None), rest.pop("version", None)
    if kind != FORMAT or type(version) is not int or version not in (2, VERSION):
        raise UsageError(
            f"{path}: format and version are {short_repr(kind)} and {short_repr(version)}; wanted {FORMAT!r} "
            f"and 2 or {VERSION}. Export the cache again."
        )
    try:
        return _manifest(rest, version)
    except ValueError as error:
        raise UsageError(f"{path}: {error}. Restore it, or export the cache again.") from None


def list_caches(folder: Path) -> str:
    """Lists the first few caches inside a folder, for errors about a folder that is no cache. Empty if it has none."""
    return ", ".join(str(path.parent) for path in sorted(folder.glob("*/manifest.json"))[:4])


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a cache.

    Raises:
        UsageError: there is none (the export has not ended, or the folder holds caches), or it is invalid (see
            `parse_manifest`).
    """
    path, role = folder / "manifest.json", "the manifest of a teacher cache (made by launchers.export_teacher)"
    if not path.exists() and (inside := list_caches(folder)):
        raise UsageError(f"{folder}: no cache (it has no manifest.json), but there are some in it. Name one: {inside}.")
    if not path.exists() and (folder / "plan.json").exists():
        raise UsageError(
            f"{folder}: the export has not ended (no manifest.json). Run the same export again to finish it."
        )
    return parse_manifest(read_json(path, role, MAX_MANIFEST_BYTES), str(path))
