"""Fields of `manifest.json`, each of its exact type and in bounds. Every function raises a `ValueError` otherwise."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, get_args

from data.cache.codec.header import MAX_POSITIONS
from data.cache.codec.levels import Codec
from data.cache.codec.rank_tables import MAX_VOCABULARY
from data.cache.indexes.shard_index import (
    MAX_BLOCK_BYTES,
    MAX_INDEX_BYTES,
    MAX_SHARD_BYTES,
    Block,
    ShardIndex,
    check_shape,
    index_name,
)
from data.cache.selection import Selection
from data.cache.tar import END_OF_TAR
from data.cache.totals import Audit
from kd_core.json_fields import (
    check_digest,
    check_integer,
    check_list,
    check_number,
    check_object,
    check_text,
    short_repr,
)

MAX_TABLES_BYTES = 1 << 26
TABLES_FILE = "tables.tar"
PLAN_BEGINS, PLAN_ENDS = "text_begins_with", "text_ends_with"  # fields of a plan, present where the lists are not empty
SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.tar")


@dataclass(frozen=True)
class Shard:
    """One tar of the cache: its blocks one after the other, and the 1,024 zero bytes that end a tar.

    `index` has the bytes and the sha256 of its index file. It is None where the manifest of an earlier version has the
    index itself.
    """

    name: str
    bytes: int
    sha256: str
    blocks: int
    records: int
    positions: int
    index: dict[str, Any] | None = None

    @classmethod
    def from_index(cls, name: str, index: ShardIndex, facts: dict[str, Any] | None) -> "Shard":
        return cls(name, *index.facts, index=facts)

    @property
    def index_name(self) -> str:
        """Returns the name of the index file."""
        return index_name(self.name)

    @property
    def files(self) -> tuple[str, ...]:
        """Returns the names of the shard's files."""
        return (self.name, self.index_name) if self.index else (self.name,)

    @property
    def facts(self) -> tuple[int, str, int, int, int]:
        """Returns what the index repeats: bytes and sha256 of the shard, and its blocks, records and positions."""
        return self.bytes, self.sha256, self.blocks, self.records, self.positions


def parse_shard(value: Any) -> Shard:
    """Parses a shard of version 4."""
    shard = check_object(value, "a shard", (f.name for f in dataclass_fields(Shard)))
    name = _shard_name(shard["name"])
    try:
        check_shape(shard["bytes"], shard["blocks"], shard["records"])
        most = shard["records"] * MAX_POSITIONS
        check_integer(shard["positions"], "positions", shard["records"], most)
        check_digest(shard["sha256"], "sha256")
        _file_facts(shard["index"], "index", MAX_INDEX_BYTES)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Shard(**shard)


def parse_listed_shard(value: Any) -> tuple[Shard, ShardIndex]:
    """Parses a shard of versions 2 and 3, whose blocks and lengths stand in the manifest."""
    shard = check_object(value, "a shard", ("blocks", "bytes", "name", "sha256"))
    name = _shard_name(shard["name"])
    blocks = [_block(block, name) for block in check_list(shard["blocks"], f"{name}: blocks")]
    size = check_integer(shard["bytes"], f"{name}: bytes", 1, MAX_SHARD_BYTES)
    if size != (expected := sum(block.bytes for block in blocks) + len(END_OF_TAR)):
        raise ValueError(f"{name}: has {size} bytes; its blocks and the tar's end have {expected}")
    index = ShardIndex.from_blocks(size, check_digest(shard["sha256"], f"{name}: sha256"), blocks, None, None)
    return Shard.from_index(name, index, None), index


def _shard_name(value: Any) -> str:
    name = check_text(value, "a shard's name")
    if not SHARD_NAME.fullmatch(name) or name == TABLES_FILE:
        raise ValueError(f"a shard's name is {short_repr(name)}; wanted a plain one, as shard-000000.tar")
    return name


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


def _file_facts(value: Any, name: str, most: int) -> dict[str, Any]:
    facts = check_object(value, name, ("bytes", "sha256"))
    check_integer(facts["bytes"], f"{name}.bytes", 1, most)
    check_digest(facts["sha256"], f"{name}.sha256")
    return facts


def parse_tables(value: Any) -> dict[str, Any]:
    return _file_facts(value, "tables", MAX_TABLES_BYTES)


def parse_selection(value: Any) -> Selection:
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


def parse_audit(value: Any) -> Audit:
    errors = check_object(value, "audit", (f.name for f in dataclass_fields(Audit)))
    return Audit(**{name: check_number(error, f"audit.{name}") for name, error in errors.items()})


def parse_statistics(value: Any) -> dict[str, float]:
    statistics = {
        name: check_number(mean, f"statistics.{name}") for name, mean in check_object(value, "statistics").items()
    }
    if missing := {"teacher_nll", "teacher_mass", "entries", "scored"} - set(statistics):
        raise ValueError(f"statistics: {min(missing)} is missing")
    return statistics


def parse_plan(value: Any) -> dict[str, Any]:
    plan = check_object(value, "a plan")
    for name in (PLAN_BEGINS, PLAN_ENDS):
        for token_id in check_list(plan.get(name, []), name):
            check_integer(token_id, name, 0, MAX_VOCABULARY - 1)
    return plan


def parse_codec(value: Any) -> Codec:
    if check_text(value, "codec") not in get_args(Codec):
        raise ValueError(f"codec: {short_repr(value)}; wanted one of {', '.join(get_args(Codec))}")
    return value


def check_names(shards: Iterable[Shard]) -> None:
    """Checks that no shard stands twice."""
    names = [shard.name for shard in shards]
    if len(set(names)) != len(names):
        raise ValueError(f"shards: {max(names, key=names.count)} stands twice")
