"""Caches of any size, written in seconds: a few blocks of random records, over and over."""

import hashlib
from pathlib import Path

import numpy as np

from data.cache.codec.block import encode_block_members
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import fit_tables
from data.cache.contents import record_digest, windows_digest
from data.cache.indexes.shard_index import ShardIndex
from data.cache.manifest import Audit, Block, Manifest, Shard
from data.cache.record import Record
from data.cache.selection import Selection
from data.cache.tar import END_OF_TAR
from data.cache.totals import Totals
from data.cache.writer import write_index, write_shard, write_tables
from data.storage.storage import storage_at

VOCAB = 32_000


def random_record(random: np.random.Generator, positions: int, K: int) -> Record:
    """Zipf's tokens, and a teacher of about 0.9 mass on K entries, the label mostly among them."""
    tokens = (VOCAB * random.random(positions + 1) ** 7).astype(np.int32)
    ids = (VOCAB * random.random((positions, 2 * K)) ** 7).astype(np.int64)
    for row, label in zip(ids, tokens[1:], strict=True):
        own = np.unique(np.append(row, label))
        row[:K] = np.append(random.permutation(own[own != label])[: K - 1], label)
    logits = np.sort(random.normal(0, 2.5, (positions, K)), axis=1)[:, ::-1]
    probs = 0.9 * np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    place = random.geometric(0.4, positions).clip(1, K) - 1
    rows = np.arange(positions)
    ids[rows, K - 1], ids[rows, place] = ids[rows, place].copy(), ids[rows, K - 1].copy()
    logs = np.log(probs).astype(np.float32)
    return Record(
        "", "document", 0, tokens, np.ones(positions, np.uint8), ids[:, :K].astype(np.int32), logs,
        np.full(positions, np.log(0.1), np.float32), logs[rows, place],
    )  # fmt: skip


def write_cache(
    folder: Path, shards: int, blocks: int, *, K: int = 64, row_length: int = 512, distinct: int = 2
) -> Path:
    """A cache of so many shards of so many blocks of about 8,192 positions."""
    random, selection, distinct = np.random.default_rng(0), Selection(top_k=K), 2
    folder.mkdir(parents=True)
    made: list[list[Record]] = []
    for _ in range(distinct):
        lengths = random.lognormal(np.log(300), 0.7, 300).astype(int).clip(16, row_length)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 8192))]
        made.append([random_record(random, int(length), K) for length in lengths])
    tables = fit_tables(made[0], VOCAB, shards * blocks * 8192)
    storage = storage_at(folder)
    tables_facts = write_tables(storage, tables)
    coding = Coding(tables, selection, "standard")
    payloads = [encode_block_members(0, records, coding, 1.0) for records in made]
    facts = [
        Block(len(payload), hashlib.sha256(payload).hexdigest(), tuple(record.positions for record in records))
        for payload, records in zip(payloads, made, strict=True)
    ]
    digests = [b"".join(map(record_digest, records)) for records in made]
    listed: list[Shard] = []
    for number in range(shards):
        name, chosen = f"shard-{number:06d}.tar", [(number + block) % distinct for block in range(blocks)]
        write_shard(storage, name, [payloads[i] for i in chosen])
        whole = (folder / name).read_bytes()
        assert whole.endswith(END_OF_TAR)
        kept = [facts[i] for i in chosen]
        sums = Totals(positions=sum(sum(block.lengths) for block in kept))
        sha256, windows_sha256 = hashlib.sha256(whole).hexdigest(), windows_digest(digests[i] for i in chosen)
        index = ShardIndex.from_blocks(len(whole), sha256, kept, sums, windows_sha256)
        listed.append(write_index(storage, name, index))
    Manifest(
        vocab_size=VOCAB, tokenizer="synthetic", teacher={}, selection=selection, row_length=row_length,
        codec="standard", audit=Audit(0, 0, 0),
        statistics={"scored": 1.0, "teacher_nll": 0.0, "teacher_mass": 0.9, "entries": float(K)},
        tables=tables_facts, plans=(), shards=tuple(listed),
    ).write(storage)  # fmt: skip
    return folder
