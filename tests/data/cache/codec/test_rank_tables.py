"""Ranks of ids: every id has exactly one after every token, and damaged or impossible tables are refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cache.codec.planes import bytes_for, compress, split_planes
from data.cache.codec.rank_tables import MAX_VOCABULARY, RankTables, fit_tables
from data.cache.record import Array
from data.cache.selection import Selection
from tests.data.cache.codec.randoms import Case, make

POSITIONS_WITH_LISTS = 100_000


def _fitted(seed: int, vocab: int, lengths: tuple[int, ...] = (40, 30), draws: int = 3) -> RankTables:
    records, _ = make(Case(seed, vocab, lengths, Selection(top_k=3, draws=draws), "standard", 1.0))
    return fit_tables(records, vocab, POSITIONS_WITH_LISTS)


@given(seed=st.integers(0, 1000), vocab=st.sampled_from([5, 17, 256, 257, 700, 70_000]))
@settings(max_examples=40, deadline=None)
def test_ids_and_ranks_are_one_to_one_after_every_token(seed: int, vocab: int) -> None:
    tables = _fitted(seed, vocab)
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([tables.tokens[:3].astype(np.int64), rng.integers(0, vocab, 4)])
    ids = np.tile(np.arange(vocab) if vocab < 1000 else rng.choice(vocab, 500, replace=False), (len(tokens), 1))
    ranks = tables.to_ranks(tokens, ids)
    assert 0 <= ranks.min() <= ranks.max() < tables.ranks
    assert all(len(set(row)) == len(row) for row in ranks.tolist())
    assert np.array_equal(tables.to_ids(tokens, ranks), ids)


def test_a_token_with_a_list_has_small_ranks() -> None:
    tables = _fitted(0, 20, (60, 60))
    assert len(tables.tokens), "frequent tokens have lists in a cache of this size"
    assert np.array_equal(tables.to_ids(tables.tokens[:1], np.arange(tables.candidates)[None]), tables.lists[:1])


@given(seed=st.integers(0, 1000), vocab=st.sampled_from([5, 256, 257, 70_000]))
@settings(max_examples=20, deadline=None)
def test_tables_come_back(seed: int, vocab: int) -> None:
    tables = _fitted(seed, vocab)
    again = RankTables.parse(tables.members())
    assert again.vocab_size == vocab
    for name in ("by_rank", "tokens", "lists", "ids", "rank_of"):
        assert np.array_equal(getattr(tables, name), getattr(again, name)), name
    assert again.members() == tables.members()


def _changed(**changes: object) -> dict[str, bytes]:
    members = _fitted(1, 40, (300, 300)).members()
    header = json.loads(members["tables.json"])
    return {**members, "tables.json": json.dumps({**header, **changes}).encode()}


def _with(name: str, values: Array | list[int]) -> dict[str, bytes]:
    return {**_fitted(1, 40, (300, 300)).members(), name: compress(split_planes(np.asarray(values), bytes_for(40)))}


TABLES = _fitted(1, 40, (300, 300))
BAD = {
    "no vocabulary": (_changed(vocab_size=0), "vocab_size: 0; wanted"),
    "a vocabulary of no machine": (_changed(vocab_size=MAX_VOCABULARY + 1), "vocab_size"),
    "a number as words": (_changed(vocab_size="40"), "vocab_size: '40'; wanted a whole number"),
    "a truth as a number": (_changed(tokens=True), "tokens: True; wanted"),
    "a fraction": (_changed(tokens=1.0), "tokens: 1.0; wanted"),
    "fewer than none": (_changed(**{"global": -1}), "global: -1; wanted"),
    "a thousand digits": (_changed(tokens=10**1000), "a number of 3322 bits"),
    "a field too many": (_changed(more=1), "'more' is unknown"),
    "other sizes": (_changed(tokens=len(TABLES.tokens) + 1), "holds .* bytes; the header's planes have"),
    "not json": ({**TABLES.members(), "tables.json": b"{"}, "Expecting"),
    "lists in lists": ({**TABLES.members(), "tables.json": b"[" * 4000}, "recursion|Expecting"),
    "a large json": ({**TABLES.members(), "tables.json": b" " * 5000}, "at most 4096"),
    "a member too many": ({**TABLES.members(), "more": b""}, "'more' is unknown"),
    "a member missing": ({n: p for n, p in TABLES.members().items() if n != "lists.zst"}, "'lists.zst' is missing"),
    "an id beyond": (_with("global.zst", [40, *TABLES.by_rank[1:]]), "holds 40; the vocabulary has 40"),
    "an id twice": (_with("global.zst", [TABLES.by_rank[1], *TABLES.by_rank[1:]]), "global.zst: holds an id twice"),
    "a token twice": (_with("tokens.zst", [TABLES.tokens[1], *TABLES.tokens[1:]]), "tokens.zst: holds an id twice"),
    "a list with an id twice": (_with("lists.zst", np.zeros(TABLES.lists.size, int)), "a list holds an id twice"),
    "no frame": ({**TABLES.members(), "global.zst": b"nothing"}, "not one whole zstd frame"),
    "half a frame": ({**TABLES.members(), "global.zst": TABLES.members()["global.zst"][:-3]}, "zstd frame"),
    "two frames": ({**TABLES.members(), "global.zst": TABLES.members()["global.zst"] * 2}, "zstd frame"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_tables_are_refused(name: str) -> None:
    members, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        RankTables.parse(members)
