"""`manifest.json`: teacher, vocabulary, selection, codec, statistics, shards and hashes of a cache.

It is written last, so a cache with a manifest is complete. Blocks and lengths of records stand in the index files of
the shards, which are read when they are needed. Every field is checked when it is read.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from data.cache.codec.header import MAX_POSITIONS
from data.cache.codec.levels import Codec
from data.cache.codec.rank_tables import MAX_VOCABULARY
from data.cache.indexes.index_files import IndexFiles
from data.cache.indexes.lengths import CacheLengths
from data.cache.indexes.shard_index import Block, ShardIndex
from data.cache.manifest_fields import (
    PLAN_BEGINS,
    PLAN_ENDS,
    TABLES_FILE,
    Shard,
    check_names,
    parse_audit,
    parse_codec,
    parse_listed_shard,
    parse_plan,
    parse_selection,
    parse_shard,
    parse_statistics,
    parse_tables,
)
from data.cache.selection import Selection
from data.cache.totals import Audit
from data.storage.storage import RETRY_SECONDS, Storage, storage_at
from kd_core.errors import UsageError
from kd_core.files import json_text, parse_json
from kd_core.json_fields import check_integer, check_list, check_object, check_text, short_repr

__all__ = ["PLAN_BEGINS", "PLAN_ENDS", "TABLES_FILE", "Audit", "Block", "Manifest", "Shard"]
FORMAT = "kd-workspace teacher cache"
VERSION = 4  # versions 2 and 3 list blocks and lengths in the manifest, and version 2 has no `made`
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES, MAX_CACHE_RECORDS = 1 << 28, 1 << 31


@dataclass(frozen=True)
class Manifest:
    """A cache: teacher and vocabulary, what was kept and how it is coded, and the shards.

    `plans` are the plans of its exports (corpus, split, selection, teacher), one for each time it grew.
    `made` has the teacher and the corpora as they were named, the time and our version. It is not part of the identity.
    `unknown` lists what a converted cache lacks, since its source did not record it: `tail`, `tokenizer`, or
    `label_log_prob` (of labels that are no entry: an upper bound is stored).
    `indexes` gives the shards' index files, and `earlier_identity` is the identity that an earlier version wrote.
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
    indexes: IndexFiles = field(default_factory=IndexFiles, compare=False, repr=False)
    earlier_identity: str = field(default="", compare=False)

    @property
    def records(self) -> int:
        """Returns the number of records."""
        return sum(shard.records for shard in self.shards)

    @property
    def positions(self) -> int:
        """Returns the number of positions."""
        return sum(shard.positions for shard in self.shards)

    def index(self, shard: int) -> ShardIndex:
        """Returns the index of a shard by its number, with its blocks.

        Raises:
            UsageError: the index file is missing or damaged.
        """
        return self.indexes.of(self.shards[shard])

    def block(self, shard: int, block: int) -> Block:
        """Returns a block by the number of its shard and its own number there."""
        return self.index(shard).block(block)

    @cached_property
    def lengths(self) -> CacheLengths:
        """Returns the lengths of all records. The indexes of all shards are read for it."""
        return self.indexes.lengths(self.shards)

    @property
    def text_begins_with(self) -> list[int]:
        """Returns the ids in front of each text that is no conversation, such as the BOS."""
        return next((plan[PLAN_BEGINS] for plan in self.plans if PLAN_BEGINS in plan), [])

    @property
    def bytes(self) -> int:
        """Returns the bytes of shards, indexes and tables."""
        indexes = sum(shard.index["bytes"] for shard in self.shards if shard.index)
        return int(self.tables["bytes"]) + sum(shard.bytes for shard in self.shards) + indexes

    def summary(self, folder: Path | str) -> str:
        """Describes the cache in one line."""
        return (
            f"{folder}: {self.records} records, {self.positions} positions in {len(self.shards)} shards, "
            f"{self.bytes / self.positions:.1f} bytes a position; teacher NLL {self.statistics['teacher_nll']:.3f}, "
            f"mass of {self.selection.words()} {self.statistics['teacher_mass']:.3f} over scored "
            f"positions, codec's KL {self.audit.kl_mean:.1e}"
        )

    def fields(self) -> dict[str, Any]:
        """Returns the fields of `manifest.json` but format and version."""
        return {
            **{name: getattr(self, name) for name in JSON_FIELDS},
            "selection": asdict(self.selection),
            "audit": asdict(self.audit),
            "shards": [asdict(shard) for shard in self.shards],
        }

    def as_json(self) -> str:
        """Returns the text of `manifest.json`."""
        return json_text({"format": FORMAT, "version": VERSION, **self.fields()})

    def identity(self) -> str:
        """Returns the sha256 of all fields but `made`.

        It identifies the whole cache, because the manifest has the hashes of all its files. A cache that an earlier
        version wrote keeps the identity that it had there.
        """
        return self.earlier_identity or _identity(VERSION, self.fields())

    def write(self, storage: Storage) -> None:
        """Writes `manifest.json`."""
        storage.write(MANIFEST_FILE, [self.as_json().encode()])


JSON_FIELDS = tuple(f.name for f in dataclass_fields(Manifest) if f.name not in ("indexes", "earlier_identity"))


def _identity(version: int, fields: dict[str, Any]) -> str:
    fixed = {"format": FORMAT, "version": version, **fields}
    fixed.pop("made", None)
    return hashlib.sha256(json_text(fixed).encode()).hexdigest()


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


def _parse_shards(value: Any, version: int, files: IndexFiles) -> tuple[tuple[Shard, ...], IndexFiles]:
    values = check_list(value, "shards")
    if version == VERSION:
        shards, indexes = tuple(map(parse_shard, values)), files
    else:
        listed = [parse_listed_shard(shard) for shard in values]
        shards = tuple(shard for shard, _ in listed)
        indexes = IndexFiles(given={shard.name: index for shard, index in listed})
    check_names(shards)
    check_integer(sum(shard.records for shard in shards), "records of all shards", 0, MAX_CACHE_RECORDS)
    return shards, indexes


def _manifest(value: dict[str, Any], version: int, files: IndexFiles) -> Manifest:
    manifest = check_object(value, "it", set(JSON_FIELDS) - ({"made"} if version == 2 else set()))
    shards, indexes = _parse_shards(manifest["shards"], version, files)
    return Manifest(
        vocab_size=check_integer(manifest["vocab_size"], "vocab_size", 1, MAX_VOCABULARY),
        tokenizer=check_text(manifest["tokenizer"], "tokenizer"),
        teacher=check_object(manifest["teacher"], "teacher"),
        selection=parse_selection(manifest["selection"]),
        row_length=check_integer(manifest["row_length"], "row_length", 1, MAX_POSITIONS),
        codec=parse_codec(manifest["codec"]),
        audit=parse_audit(manifest["audit"]),
        statistics=parse_statistics(manifest["statistics"]),
        tables=parse_tables(manifest["tables"]),
        plans=tuple(parse_plan(plan) for plan in check_list(manifest["plans"], "plans")),
        shards=shards,
        unknown=tuple(check_text(name, "unknown") for name in check_list(manifest["unknown"], "unknown")),
        made=check_object(manifest.get("made", {}), "made"),
        indexes=indexes,
        # The identity of versions 2 and 3 is computed on the text that version 2 wrote.
        earlier_identity="" if version == VERSION else _identity(2, manifest),
    )


def parse_manifest(value: Any, path: str, files: IndexFiles | None = None) -> Manifest:
    """Builds a manifest from its JSON. Every field must have its exact type and be in bounds.

    Args:
        value: the JSON.
        path: where it was read, for messages.
        files: the index files of its shards.

    Raises:
        UsageError: the format or version is another one, or a field is missing, unknown or out of bounds.
    """
    rest = dict(cast(dict[str, Any], value)) if isinstance(value, dict) else {}
    kind, version = rest.pop("format", None), rest.pop("version", None)
    if kind != FORMAT or type(version) is not int or version not in (2, 3, VERSION):
        raise UsageError(
            f"{path}: format and version are {short_repr(kind)} and {short_repr(version)}; wanted {FORMAT!r} "
            f"and 2, 3 or {VERSION}. Export the cache again."
        )
    try:
        return _manifest(rest, version, files or IndexFiles())
    except ValueError as error:
        raise UsageError(f"{path}: {error}. Restore it, or export the cache again.") from None


def list_caches(folder: Path) -> str:
    """Lists the first few caches inside a folder, for errors about a folder that is no cache. Empty if it has none."""
    return ", ".join(str(path.parent) for path in sorted(folder.glob("*/manifest.json"))[:4])


def read_manifest(path: Path | str, retry_seconds: float = RETRY_SECONDS) -> Manifest:
    """Reads the manifest of a cache in a folder or behind a URL.

    Failed requests are tried again for `retry_seconds`.

    Raises:
        UsageError: there is none (the export has not ended, or the folder holds caches), or it is invalid (see
            `parse_manifest`).
    """
    storage, role = (
        storage_at(path, retry_seconds),
        "the manifest of a teacher cache (made by launchers.export_teacher)",
    )
    url = storage.url(MANIFEST_FILE)
    if storage.size(MANIFEST_FILE) is None:
        if inside := list_caches(Path(path)):
            raise UsageError(
                f"{path}: no cache (it has no manifest.json), but there are some in it. Name one: {inside}."
            )
        if storage.size("plan.json") is not None:
            raise UsageError(
                f"{path}: the export has not ended (no manifest.json). Run the same export again to finish it."
            )
        raise UsageError(f"{url}: no such file, wanted {role}. Check the path.")
    value = parse_json(storage.read(MANIFEST_FILE, MAX_MANIFEST_BYTES), url, role)
    return parse_manifest(value, url, IndexFiles(path, retry_seconds))
