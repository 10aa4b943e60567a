"""Ranks of token ids: small numbers for likely ids, so that the gaps between sorted ranks compress well.

    rank(id | input token) = place in the token's candidate list     where the id is in the list, 0 … C − 1
                             C + place in the global list            otherwise, C … C + V − 1

A token's candidate list has the C ids that the teacher expected most often after that token. A token without a list of
its own uses the first C ids of the global list. The global list has all ids, led by those that the teacher expected
most often anywhere. Both are counted on a pilot, the first records of the cache.
Blocks store ranks alone. The tables are stored once a cache, in `tables.tar`, and counted in its bytes:

    global.zst    the likeliest ids of the cache; all others follow in rising order      (2 to 4 byte planes)
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

from data.cache.codec.planes import bytes_for, compress, decompress, join_planes, split_planes
from data.cache.record import UNUSED, Record
from kd_core.json_fields import check_integer, check_object

Array = np.ndarray[Any, np.dtype[Any]]
CANDIDATES = 256
MAX_LISTS = 2048
POSITIONS_PER_LIST = 768  # a list costs some 300 bytes, so half a byte a position; it saves 2 to 4 bytes a position
POSITIONS_PER_RANKED = 4  # a cache of n positions lists at most n / 4 ids by frequency
LEAST_SEEN = 8  # with fewer pilot positions after a token, its list would be noise
MAX_VOCABULARY = 1 << 22
MAX_JSON_BYTES = 4096
MEMBERS = ("tables.json", "global.zst", "tokens.zst", "lists.zst")


@dataclass(frozen=True)
class RankTables:
    """The global list and the candidate lists of a cache.

    `by_rank` [G] has the ids that `global.zst` lists, the likeliest first. `tokens` [L] are the tokens with a list of
    their own, and `lists` [L, C] the ids of these lists.
    """

    vocab_size: int
    by_rank: Array
    tokens: Array
    lists: Array

    @property
    def candidates(self) -> int:
        """Returns C, or 0 where there are no lists."""
        return self.lists.shape[1]

    @property
    def ranks(self) -> int:
        """Returns the number of ranks, C + V."""
        return self.candidates + self.vocab_size

    @cached_property
    def ids(self) -> Array:
        """Returns all ids by global rank, [V]."""
        # The listed ids first, then the others in rising order.
        rest = np.ones(self.vocab_size, bool)
        rest[self.by_rank] = False
        return np.concatenate([self.by_rank, np.flatnonzero(rest)]).astype(np.int32)

    @cached_property
    def rank_of(self) -> Array:
        """Returns the global rank of each id, [V]."""
        # Invert the permutation `ids`.
        ranks = np.empty(self.vocab_size, np.int32)
        ranks[self.ids] = np.arange(self.vocab_size, dtype=np.int32)
        return ranks

    @cached_property
    def _list_of(self) -> Array:
        """Returns the index of each token's list, [V]. Index L, the globally likeliest, is for tokens without one."""
        index = np.full(self.vocab_size, len(self.tokens), np.int32)
        index[self.tokens] = np.arange(len(self.tokens), dtype=np.int32)
        return index

    @cached_property
    def _flat(self) -> Array:
        """Returns all lists, that of the globally likeliest, and the global list, end to end.  [(L + 1)·C + V]"""
        return np.concatenate([self.lists.ravel(), self.ids[: self.candidates], self.ids]).astype(self.narrow)

    @property
    def narrow(self) -> type[np.uint16 | np.int32]:
        """Returns the smallest dtype that holds an id, since memory is what limits reading."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.int32

    def to_ranks(self, tokens: Array, ids: Array) -> Array:
        """Returns the ranks of ids [N, K] after the input tokens [N]."""
        # C + global rank, for ids that are in no list.  [N, K]
        ranks = self.rank_of[ids] + np.int32(self.candidates)
        if not self.candidates:
            return ranks
        list_of = self._list_of[tokens]
        # One list at a time: `place` maps an id to its place in that list, or −1.  [V]
        place = np.full(self.vocab_size, -1, np.int32)
        for index in np.unique(list_of).tolist():
            candidates = self.lists[index] if index < len(self.lists) else self.ids[: self.candidates]
            place[candidates] = np.arange(self.candidates, dtype=np.int32)
            # Take the place for the positions that use this list, where the id is in it.
            rows = np.flatnonzero(list_of == index)
            places = place[ids[rows]]
            ranks[rows] = np.where(places >= 0, places, ranks[rows])
            # Clear these ids alone, which is cheaper than a new array of V.
            place[candidates] = -1
        return ranks

    def to_ids(self, tokens: Array, ranks: Array) -> Array:
        """Returns the ids of ranks [N, K] after the input tokens [N], in dtype `narrow`.

        The caller has checked that all ranks are below `self.ranks`.
        """
        C = self.candidates
        if not C:
            return self._flat.take(ranks, mode="wrap")  # the fastest mode; no rank is out of range
        # Index into `_flat`: list·C + rank where rank < C, else L·C + rank.  [N, K]
        # As rank + L·C + [rank < C]·(list·C − L·C) it is computed in place, which is faster than `where`.
        last_list = np.int32(len(self.tokens) * C)
        index = (ranks < C).astype(np.int32)
        index *= (self._list_of.take(tokens) * C - last_list)[:, None]
        index += ranks
        index += last_list
        return self._flat.take(index, mode="wrap")

    def members(self) -> dict[str, bytes]:
        """Returns the members of `tables.tar` by name."""
        header = {
            "candidates": self.candidates,
            "global": len(self.by_rank),
            "tokens": len(self.tokens),
            "vocab_size": self.vocab_size,
        }
        width = bytes_for(self.vocab_size)
        return {
            "tables.json": json.dumps(header, sort_keys=True).encode(),
            "global.zst": compress(split_planes(self.by_rank, width)),
            "tokens.zst": compress(split_planes(self.tokens, width)),
            "lists.zst": compress(split_planes(self.rank_of[self.lists], width)),
        }

    @classmethod
    def parse(cls, members: dict[str, bytes]) -> "RankTables":
        """Parses the members of `tables.tar`.

        Raises:
            ValueError: a member is missing, damaged, out of bounds or has an id twice.
        """
        try:
            check_object(members, "members", MEMBERS)
            V, G, L, C = _sizes(members["tables.json"])
            sizes = {"global.zst": G, "tokens.zst": L, "lists.zst": L * C}
            numbers: dict[str, Array] = {}
            for name, size in sizes.items():
                numbers[name] = join_planes(decompress(members[name], [size] * bytes_for(V)))
                if size and int(numbers[name].max()) >= V:
                    raise ValueError(f"{name}: holds {numbers[name].max()}; the vocabulary has {V}")
        except RecursionError as error:
            raise ValueError(f"tables.json: {error}") from None
        for name in ("global.zst", "tokens.zst"):
            if len(np.unique(numbers[name])) != len(numbers[name]):
                raise ValueError(f"{name}: holds an id twice")
        # Lists are stored as global ranks: the global list turns them into ids.  [L·C] → [L, C]
        global_only = cls(V, numbers["global.zst"].astype(np.int32), np.zeros(0, np.int32), np.zeros((0, 0), np.int32))
        lists = global_only.ids[numbers["lists.zst"].astype(np.int64)].reshape(L, C)
        if (np.diff(np.sort(lists, axis=1), axis=1) == 0).any():
            raise ValueError("lists.zst: a list holds an id twice")
        return cls(V, global_only.by_rank, numbers["tokens.zst"].astype(np.int32), lists)


def _sizes(payload: bytes) -> tuple[int, int, int, int]:
    """Parses V, G, L and C of `tables.json`, each within its bound."""
    if len(payload) > MAX_JSON_BYTES:
        raise ValueError(f"tables.json: has {len(payload)} bytes; at most {MAX_JSON_BYTES} are read")
    value = check_object(json.loads(payload.decode()), "tables.json", ("candidates", "global", "tokens", "vocab_size"))
    V = check_integer(value["vocab_size"], "vocab_size", 1, MAX_VOCABULARY)
    return (
        V,
        check_integer(value["global"], "global", 0, V),
        check_integer(value["tokens"], "tokens", 0, min(V, MAX_LISTS)),
        check_integer(value["candidates"], "candidates", 0, min(V, CANDIDATES)),
    )


def _most_frequent(counts: Array, limit: int) -> Array:
    """Returns at most `limit` ids by falling count, equal counts by rising id, without ids of count 0."""
    # A stable sort of −count keeps ids of equal counts in rising order.  [V] → [limit]
    order = np.argsort(-counts, kind="stable")[:limit]
    return order[counts[order] > 0].astype(np.int32)


def fit_tables(pilot: Sequence[Record], vocab_size: int, positions: int) -> RankTables:
    """Fits tables on the entries and samples of the pilot.

    A cache of more positions gets more lists: `positions` are those of the whole cache.
    """
    tokens = np.concatenate([record.token_ids[:-1].astype(np.int64) for record in pilot])
    # One pair an entry or sample: the input token, and the id that the teacher expected after it.
    after: list[Array] = []
    ids: list[Array] = []
    for record in pilot:
        for entries, logs in ((record.topk_token_ids, record.topk_log_probs), record.samples()):
            used = logs > UNUSED
            after.append(np.repeat(record.token_ids[:-1].astype(np.int64), used.sum(axis=1)))
            ids.append(entries[used].astype(np.int64))
    after_all, ids_all = np.concatenate(after), np.concatenate(ids)
    # The global list: ids by their count over all pairs.  [G]
    by_rank = _most_frequent(np.bincount(ids_all, minlength=vocab_size), positions // POSITIONS_PER_RANKED)
    global_only = RankTables(vocab_size, by_rank, np.zeros(0, np.int32), np.zeros((0, 0), np.int32))
    # The tokens that get a list: the most frequent inputs of the pilot.  [L]
    seen = np.bincount(tokens, minlength=vocab_size)
    frequent = _most_frequent(np.where(seen >= LEAST_SEEN, seen, 0), min(MAX_LISTS, positions // POSITIONS_PER_LIST))
    if not len(frequent):
        return global_only
    # Sort the pairs by input token, so that those of one token are the slice start to end.  [pairs], [L] each
    order = np.argsort(after_all, kind="stable")
    by_token = after_all[order]
    starts, ends = (np.searchsorted(by_token, frequent, side) for side in ("left", "right"))
    # A token's list: ids by falling count after that token, equal ones by rising global rank.  [L, C]
    lists = np.empty((len(frequent), min(CANDIDATES, vocab_size)), np.int32)
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        counts = np.bincount(ids_all[order[start:end]], minlength=vocab_size)
        lists[index] = np.lexsort((global_only.rank_of, -counts))[: lists.shape[1]]
    return RankTables(vocab_size, by_rank, frequent, lists)
