"""Shards of an export that are done, by their index files, and the manifest that is made from these.

    shard on the storage → read back strictly → index file: the receipt → manifest of all receipts

A shard whose index is there and states the shard's size is not read again. `launchers.inspect --verify` does that.
"""

import logging
from typing import NamedTuple

import numpy as np

from data.cache.codec.coding import Coding
from data.cache.indexes.index_files import IndexFiles, in_parallel
from data.cache.indexes.shard_index import MAX_INDEX_BYTES, ShardIndex, index_name
from data.cache.manifest import TABLES_FILE, Manifest, Shard, made_now
from data.cache.manifest_fields import MAX_TABLES_BYTES
from data.cache.totals import Totals
from data.cache.writer import file_facts, read_back, write_index
from data.export.plan import CachePlan
from data.export.planned_shards import PlannedShard
from data.export.repeatability import SCORED_BY_FILE, scored_by
from kd_core.errors import UsageError
from kd_core.hub import pin_commit

log = logging.getLogger("kd")


class Receipt(NamedTuple):
    """A shard's entry in the manifest, and the sums over its positions."""

    shard: Shard
    totals: Totals


def read_receipt(plan: CachePlan, name: str, planned: PlannedShard | Shard) -> Receipt | None:
    """Returns what the index of a shard states, or None where the shard is to be read back.

    Args:
        plan: the plan of the cache.
        name: the shard's name.
        planned: the windows that it must hold, or the manifest's entry of a shard of the cache that grows.

    Raises:
        UsageError: the storage cannot be read.
    """
    storage, file = plan.storage, index_name(name)
    if storage.size(file) is None:
        return None
    data = storage.read(file, MAX_INDEX_BYTES)
    try:
        index = ShardIndex.parse(data)
    except ValueError as error:
        log.warning("%s: damaged: %s; its shard is read back again", storage.url(file), error)
        return None
    if index.shard_bytes != storage.size(name):
        return None
    _check_planned(plan, name, index, planned)
    assert index.totals
    return Receipt(Shard.from_index(name, index, file_facts(data)), index.totals)


def _check_planned(plan: CachePlan, name: str, index: ShardIndex, planned: PlannedShard | Shard) -> None:
    """Checks that a shard holds the planned windows, or is the one of the manifest's entry.

    Raises:
        UsageError: it does not.
    """
    url = plan.storage.url(name)
    if isinstance(planned, PlannedShard):
        counts = [len(block) for block in planned.blocks]
        lengths = plan.windows.positions_of(planned.windows)
        if not np.array_equal(index.block_records, counts) or not np.array_equal(index.lengths, lengths):
            raise UsageError(
                f"{url}: holds records of {index.lengths[:8].tolist()} … positions in {len(index)} blocks, wanted "
                f"{lengths[:8].tolist()} … in {len(counts)}. Delete it and run again."
            )
        if index.windows_sha256 != plan.windows.sha256_of(planned.windows):
            raise UsageError(
                f"{url}: holds records of another corpus than the planned windows. Delete it and run again."
            )
    elif index.facts != planned.facts:
        raise UsageError(f"{url}: is not the shard that the manifest names. Restore it.")


def _earlier_shards(plan: CachePlan) -> tuple[Shard, ...]:
    return plan.grown_from.shards if plan.grown_from else ()


def verify_earlier_shards(plan: CachePlan, coding: Coding, rank: int, ranks: int) -> None:
    """Reads back this rank's share of the shards without an index, which an earlier version wrote.

    Raises:
        UsageError: a shard is damaged, or another one than the manifest names.
    """
    for shard in [shard for shard in _earlier_shards(plan) if shard.index is None][rank::ranks]:
        if read_receipt(plan, shard.name, shard) is None:
            verify_shard(plan, shard.name, coding, shard)


def verify_shard(plan: CachePlan, name: str, coding: Coding, planned: PlannedShard | Shard) -> None:
    """Reads a shard back strictly, and writes its index.

    Raises:
        UsageError: it is damaged, does not hold the planned windows, or its labels and entries are shifted.
    """
    index = read_back(plan.storage, name, coding)
    _check_planned(plan, name, index, planned)
    write_index(plan.storage, name, index)


def _all_receipts(plan: CachePlan) -> list[Receipt]:
    """Returns the receipts of all shards in order, those of the cache that grows first."""

    def receipt(shard: PlannedShard | Shard) -> Receipt:
        if receipt := read_receipt(plan, shard.name, shard):
            return receipt
        raise UsageError(
            f"{plan.storage.url(shard.name)}: the shard or its index is gone since it was written. Run the same export "
            "again."
        )

    return in_parallel(receipt, [*_earlier_shards(plan), *plan.shards])


def write_manifest(plan: CachePlan) -> Manifest:
    """Writes and returns the manifest, made from the indexes of all shards.

    Raises:
        UsageError: a shard or its index is missing.
    """
    plan = plan.completed()
    before = plan.grown_from.made if plan.grown_from else {}
    made = {
        **made_now(pin_commit(plan.export.teacher), [*before.get("corpora", []), plan.export.corpus.path]),
        "drawn_from": plan.drawn_from,
    }
    if scored := scored_by(plan):
        made["scored_by"] = scored
    if chat := plan.chat or before.get("chat"):
        made["chat"] = chat
    receipts = _all_receipts(plan)
    totals = sum((receipt.totals for receipt in receipts), Totals())
    manifest = Manifest(
        vocab_size=plan.teacher.vocab_size,
        tokenizer=plan.identity["tokenizer"],
        teacher={**plan.identity["teacher"], "architecture": plan.teacher.architecture, "dtype": plan.export.dtype},
        selection=plan.export.selection,
        row_length=plan.export.row_length,
        codec=plan.export.codec,
        audit=totals.audit(),
        statistics=totals.statistics(),
        tables=file_facts(plan.storage.read(TABLES_FILE, MAX_TABLES_BYTES)),
        plans=(*(plan.grown_from.plans if plan.grown_from else ()), plan.identity),
        shards=tuple(receipt.shard for receipt in receipts),
        made=made,
        indexes=IndexFiles(plan.folder),
    )
    manifest.write(plan.storage)
    plan.storage.delete(SCORED_BY_FILE)
    return manifest
