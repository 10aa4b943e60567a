"""Records to write and read: out of a cache, repeated until there are enough, or made up with realistic statistics.

Made-up ones: tokens by Zipf's law, entries likelier the commoner (as after a real text), probabilities of a teacher
that is sometimes sure and mostly not.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.cache.codec.block import encode_block_members
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import fit_tables
from data.cache.manifest import Audit, Manifest, Shard, read_manifest
from data.cache.record import UNUSED, Array, Record
from data.cache.selection import Selection
from data.cache.writer import read_back, write_index, write_shard, write_tables
from data.storage.storage import storage_at
from data.stream.stream import Shards

BLOCK_POSITIONS, SHARD_POSITIONS, PILOT_POSITIONS = 8192, 40_960, 65_536
ROW_LENGTH = 512


def from_cache(folder: Path) -> tuple[list[Record], int]:
    """All records of a cache, and its vocabulary."""
    return list(Shards(str(folder)).reader().records()), read_manifest(folder).vocab_size


def made_up(positions: int, vocab_size: int, top_k: int, seed: int = 0) -> list[Record]:
    """Records of up to `ROW_LENGTH` positions."""
    random, records = np.random.default_rng(seed), list[Record]()
    zipf = 1.0 / np.arange(1, vocab_size + 1)
    after = np.cumsum(zipf / zipf.sum())
    while positions > 0:
        T = min(positions, ROW_LENGTH if random.random() < 0.75 else int(random.integers(32, ROW_LENGTH)))
        positions -= T
        tokens = np.searchsorted(after, random.random(T + 1)).clip(max=vocab_size - 1).astype(np.int32)
        ids = _distinct(np.searchsorted(after, random.random((T, top_k))), vocab_size)
        scale = random.gamma(4.0, 0.5, (T, 1))  # the exponent by which entries fall off
        logits = -scale * np.log(np.arange(1, top_k + 1)) + random.normal(0, 0.3, (T, top_k))
        inside = np.log(1 - random.beta(1.0, 7.0, T))
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) + inside[:, None]
        own = np.where(ids == tokens[1:, None], logs, UNUSED).max(axis=1)
        tail = np.log(-np.expm1(inside))
        records.append(
            Record(
                "", f"made up {len(records)}", 0, tokens, np.ones(T, np.uint8), ids.astype(np.int32),
                logs.astype(np.float32), tail.astype(np.float32),
                np.where(own > UNUSED, own, np.minimum(tail - 3, logs.min(axis=1))).astype(np.float32),
            )
        )  # fmt: skip
    return records


def _distinct(ids: Array, vocab_size: int) -> Array:
    """The same ids, each once in its row: repeated ones go up to the next free one."""
    ids = np.sort(ids.astype(np.int64), axis=1)
    steps = np.arange(ids.shape[1])
    return (np.maximum.accumulate(ids - steps, axis=1) + steps).clip(max=vocab_size - ids.shape[1] + steps)


def repeated(records: Sequence[Record], positions: int, seed: int = 0) -> list[Record]:
    """The records in permuted order, again and again, until so many positions are there; named by number.

    Between two copies lies the whole set, so that no compressor's window sees both.
    """
    random, taken, total = np.random.default_rng(seed), list[Record](), 0
    while total < positions:
        for index in random.permutation(len(records)).tolist():
            if total >= positions:
                break
            taken.append(replace(records[index], name=f"{len(taken):08d}"))
            total += records[index].positions
    return taken


def drawn(record: Record, draws: int, vocab_size: int, random: np.random.Generator) -> Record:
    """The record as samples alone, drawn from its head; a draw of the tail becomes some common id."""
    T, K = record.topk_token_ids.shape
    ends = np.cumsum(np.exp(record.topk_log_probs.astype(np.float64)), axis=1)
    column = (random.random((T, draws))[:, :, None] > ends[:, None]).sum(axis=2)
    ids = np.take_along_axis(record.topk_token_ids.astype(np.int64), column.clip(max=K - 1), 1)
    of_tail = np.minimum(random.zipf(1.2, (T, draws)), vocab_size) - 1
    ids = np.sort(np.where(column < K, ids, of_tail), axis=1)
    first = np.diff(ids, axis=1, prepend=-1) > 0
    place = first.cumsum(axis=1) - 1
    width, rows = int(place.max()) + 1, np.arange(T)[:, None]
    counts, distinct = np.zeros((T, width)), np.zeros((T, width), np.int32)
    np.add.at(counts, (rows, place), 1)
    distinct[rows, place] = ids
    with np.errstate(divide="ignore"):
        weights = np.log(counts / draws).astype(np.float32)
    return replace(
        record,
        topk_token_ids=np.zeros((T, 0), np.int32),
        topk_log_probs=np.zeros((T, 0), np.float32),
        tail_log_prob=np.zeros(T, np.float32),
        sampled_token_ids=distinct,
        sampled_log_weights=weights,
    )


def _runs(records: Sequence[Record], most: int) -> list[list[Record]]:
    runs: list[list[Record]] = [[]]
    for record in records:
        if runs[-1] and sum(each.positions for each in runs[-1]) + record.positions > most:
            runs.append([])
        runs[-1].append(record)
    return runs


def shards_of(records: Sequence[Record]) -> list[list[Record]]:
    """What shares a shard, in every format."""
    return _runs(records, SHARD_POSITIONS)


def write_cache(folder: Path, records: Sequence[Record], vocab_size: int, selection: Selection, codec: str) -> None:
    """A cache of records, by the real codec and writer."""
    folder.mkdir(parents=True)
    tables = fit_tables(_runs(records, PILOT_POSITIONS)[0], vocab_size, sum(record.positions for record in records))
    storage = storage_at(folder)
    facts = write_tables(storage, tables)
    coding, first, shards = Coding(tables, selection, codec), 0, list[Shard]()
    for number, own in enumerate(shards_of(records)):
        name, written = f"shard-{number:06d}.tar", list[bytes]()
        for run in _runs(own, BLOCK_POSITIONS):
            written.append(encode_block_members(first, run, coding, max_kl=1.0))
            first += len(run)
        write_shard(storage, name, written)
        shards.append(write_index(storage, name, read_back(storage, name, coding)))
    longest = max(record.positions for record in records)
    unmeasured = dict.fromkeys(("teacher_nll", "teacher_mass", "entries"), 0.0)
    Manifest(
        vocab_size, "none", {}, selection, longest, codec, Audit(0, 0, 0), {**unmeasured, "scored": 1.0}, facts, ({},),
        tuple(shards),
    ).write(storage)  # fmt: skip
