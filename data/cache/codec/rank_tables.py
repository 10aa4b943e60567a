"""Ranks of token ids: what makes sorted ids cheap, because a teacher's candidates are mostly frequent ones.

The rank of an id at a position is its place in the candidate list of the position's input token, where that token has
a list and the id stands in it; else C + its place in the global list. Lists hold what the teacher expected most often
after that token in a pilot (the first records of the cache), the global list what it expected most often at all.
A rank is all that the codec stores; `tables.tar` lies once in the cache and is counted in its bytes.

    global.zst    the likeliest ids of the cache, then come all others in rising order   (2 to 4 byte planes)
    tokens.zst    tokens that have a list                                                (2 to 4 byte planes)
    lists.zst     their lists, C ids each, as places in the global list                  (2 to 4 byte planes)
    tables.json   {"vocab_size", "global": ids written, "tokens": L, "candidates": C}
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.cache.codec.planes import compress, decompress, join, split, width_of
from data.cache.record import UNUSED, Record
from kd_core.json_fields import fields, integer

Array = np.ndarray[Any, np.dtype[Any]]
CANDIDATES = 256
MAX_LISTS = 2048
POSITIONS_PER_LIST = 768  # a list costs some 300 bytes and saves 2 to 4 a position; half a byte a position is spent
POSITIONS_PER_RANKED = 4
LEAST_SEEN = 8  # pilot positions below which a token's list would be noise
MAX_VOCABULARY = 1 << 22
MAX_JSON_BYTES = 4096
MEMBERS = ("tables.json", "global.zst", "tokens.zst", "lists.zst")


@dataclass(frozen=True)
class Tables:
    """`by_rank` [written] ids, the likeliest first; `tokens` [L]; `lists` [L, C] ids."""

    vocab_size: int
    by_rank: Array
    tokens: Array
    lists: Array

    @property
    def candidates(self) -> int:
        """C; 0 where there are no lists."""
        return self.lists.shape[1]

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.candidates + self.vocab_size

    @cached_property
    def ids(self) -> Array:
        """All ids by global rank, [V]."""
        rest = np.ones(self.vocab_size, bool)
        rest[self.by_rank] = False
        return np.concatenate([self.by_rank, np.flatnonzero(rest)]).astype(np.int32)

    @cached_property
    def rank_of(self) -> Array:
        """The global rank of each id, [V]."""
        ranks = np.empty(self.vocab_size, np.int32)
        ranks[self.ids] = np.arange(self.vocab_size, dtype=np.int32)
        return ranks

    @cached_property
    def _list_of(self) -> Array:
        """Which list a token has; the last, of the globally likeliest, where it has none of its own."""
        found = np.full(self.vocab_size, len(self.tokens), np.int32)
        found[self.tokens] = np.arange(len(self.tokens), dtype=np.int32)
        return found

    @cached_property
    def _flat(self) -> Array:
        """All lists, that of the globally likeliest, and the global list, end to end."""
        return np.concatenate([self.lists.ravel(), self.ids[: self.candidates], self.ids]).astype(self.narrow)

    @property
    def narrow(self) -> type[np.uint16 | np.int32]:
        """What holds an id in least memory, which is what reading is short of."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.int32

    def to_ranks(self, tokens: Array, ids: Array) -> Array:
        """Ranks of ids [T, K] after the input tokens [T]."""
        ranks = self.rank_of[ids] + np.int32(self.candidates)
        if not self.candidates:
            return ranks
        list_of = self._list_of[tokens]
        within = np.full(self.vocab_size, -1, np.int32)
        for index in np.unique(list_of).tolist():
            own = self.lists[index] if index < len(self.lists) else self.ids[: self.candidates]
            within[own] = np.arange(self.candidates, dtype=np.int32)
            rows = np.flatnonzero(list_of == index)
            found = within[ids[rows]]
            ranks[rows] = np.where(found >= 0, found, ranks[rows])
            within[own] = -1
        return ranks

    def to_ids(self, tokens: Array, ranks: Array) -> Array:
        """Ids of ranks [T, K], all below `ranks`, after the input tokens [T]; `narrow`."""
        C = self.candidates
        if not C:
            return self._flat.take(ranks, mode="wrap")  # the quickest way to take: nothing is beyond
        beyond = np.int32(len(self.tokens) * C)
        at = (ranks < C).astype(np.int32)  # a product is quicker here than a choice
        at *= (self._list_of.take(tokens) * C - beyond)[:, None]
        at += ranks
        at += beyond
        return self._flat.take(at, mode="wrap")

    def members(self) -> dict[str, bytes]:
        """The members of `tables.tar`."""
        header = {
            "candidates": self.candidates,
            "global": len(self.by_rank),
            "tokens": len(self.tokens),
            "vocab_size": self.vocab_size,
        }
        width = width_of(self.vocab_size)
        return {
            "tables.json": json.dumps(header, sort_keys=True).encode(),
            "global.zst": compress(split(self.by_rank, width)),
            "tokens.zst": compress(split(self.tokens, width)),
            "lists.zst": compress(split(self.rank_of[self.lists], width)),
        }

    @classmethod
    def of_members(cls, members: dict[str, bytes]) -> "Tables":
        """Read back.

        Raises:
            ValueError: a member is missing or damaged, or holds what no table can.
        """
        try:
            fields(members, "members", MEMBERS)
            V, written, L, C = _bounded(members["tables.json"])
            sizes = {"global.zst": written, "tokens.zst": L, "lists.zst": L * C}
            found: dict[str, Array] = {}
            for name, size in sizes.items():
                found[name] = join(decompress(members[name], [size] * width_of(V)))
                if size and int(found[name].max()) >= V:
                    raise ValueError(f"{name}: holds {found[name].max()}; the vocabulary has {V}")
        except RecursionError as error:
            raise ValueError(f"tables.json: {error}") from None
        for name in ("global.zst", "tokens.zst"):
            if len(np.unique(found[name])) != len(found[name]):
                raise ValueError(f"{name}: holds an id twice")
        plain = cls(V, found["global.zst"].astype(np.int32), np.zeros(0, np.int32), np.zeros((0, 0), np.int32))
        lists = plain.ids[found["lists.zst"].astype(np.int64)].reshape(L, C)
        if (np.diff(np.sort(lists, axis=1), axis=1) == 0).any():
            raise ValueError("lists.zst: a list holds an id twice")
        return cls(V, plain.by_rank, found["tokens.zst"].astype(np.int32), lists)


def _bounded(payload: bytes) -> tuple[int, int, int, int]:
    """V, ids written, L and C of `tables.json`."""
    if len(payload) > MAX_JSON_BYTES:
        raise ValueError(f"tables.json: has {len(payload)} bytes; at most {MAX_JSON_BYTES} are read")
    value = fields(json.loads(payload.decode()), "tables.json", ("candidates", "global", "tokens", "vocab_size"))
    V = integer(value["vocab_size"], "vocab_size", 1, MAX_VOCABULARY)
    return (
        V,
        integer(value["global"], "global", 0, V),
        integer(value["tokens"], "tokens", 0, min(V, MAX_LISTS)),
        integer(value["candidates"], "candidates", 0, min(V, CANDIDATES)),
    )


def _likeliest(counts: Array, most: int) -> Array:
    """Ids that were counted, the most frequent first, of equals the smaller."""
    order = np.argsort(-counts, kind="stable")[:most]
    return order[counts[order] > 0].astype(np.int32)


def fit_tables(pilot: Sequence[Record], vocab_size: int, positions: int) -> Tables:
    """Tables from the pilot's entries, as large as a cache of so many positions can carry."""
    tokens = np.concatenate([record.token_ids[:-1].astype(np.int64) for record in pilot])
    after: list[Array] = []  # of each entry: the input token, and the id
    ids: list[Array] = []
    for record in pilot:
        for entries, logs in ((record.topk_token_ids, record.topk_log_probs), record.samples()):
            used = logs > UNUSED
            after.append(np.repeat(record.token_ids[:-1].astype(np.int64), used.sum(axis=1)))
            ids.append(entries[used].astype(np.int64))
    after_all, ids_all = np.concatenate(after), np.concatenate(ids)
    by_rank = _likeliest(np.bincount(ids_all, minlength=vocab_size), positions // POSITIONS_PER_RANKED)
    plain = Tables(vocab_size, by_rank, np.zeros(0, np.int32), np.zeros((0, 0), np.int32))
    seen = np.bincount(tokens, minlength=vocab_size)
    frequent = _likeliest(np.where(seen >= LEAST_SEEN, seen, 0), min(MAX_LISTS, positions // POSITIONS_PER_LIST))
    if not len(frequent):
        return plain
    order = np.argsort(after_all, kind="stable")
    by_token = after_all[order]
    starts, ends = (np.searchsorted(by_token, frequent, side) for side in ("left", "right"))
    lists = np.empty((len(frequent), min(CANDIDATES, vocab_size)), np.int32)
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        own = np.bincount(ids_all[order[start:end]], minlength=vocab_size)
        lists[index] = np.lexsort((plain.rank_of, -own))[: lists.shape[1]]
    return Tables(vocab_size, by_rank, frequent, lists)
