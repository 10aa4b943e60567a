"""The order of rows: each record once an epoch, the same on any ranks, from any row, and as the plain lists have it."""

import time
import tracemalloc
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rank_reading import KINDS, counted_order, drawn_lengths, read_as_rank
from data.cache.indexes.lengths import CacheLengths
from data.stream.mixing import MixedOrder
from data.stream.order import CacheOrder, Place, pack_segment
from data.stream.packing import pack_rows
from data.stream.segments import Segments, count_side_by_side
from data.stream.source import RowOrder
from data.stream.stream import share_of_step
from kd_core.errors import UsageError
from tests.reference import row_order

LENGTHS = st.lists(st.integers(1, 20), max_size=60)
BLOCKS = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=60), min_size=1, max_size=12)


@given(LENGTHS)
def test_packing_keeps_every_record_once_and_no_row_overflows(lengths: list[int]) -> None:
    rows = pack_rows(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 20 for row in rows)
    assert rows == [sorted(row) for row in row_order.pack(lengths, 20)]


@given(LENGTHS)
def test_no_two_rows_could_have_been_one_half_empty(lengths: list[int]) -> None:
    filled = [sum(lengths[i] for i in row) for row in pack_rows(lengths, 20)]
    assert sum(2 * fill <= 20 for fill in filled) <= 1


def test_a_record_longer_than_a_row_is_refused() -> None:
    with pytest.raises(UsageError, match=r"has 21 positions, a row 20"):
        pack_rows([3, 21], 20)
    with pytest.raises(UsageError, match=r"has 21 positions, a row 20"):
        counted_order(CacheLengths.from_shards([[[3, 21]]]), 20)


def _refs(order: RowOrder, index: int) -> list[tuple[int, int, int, int]]:
    place = order.place(index)
    return [(place.part, *ref) for ref in order.orders[place.part].row(place).records]


@given(BLOCKS, st.integers(1, 5), st.sampled_from([None, 0, 7]), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_rows_are_those_of_the_plain_lists(blocks: list[list[int]], per_shard: int, seed: int | None, e: int) -> None:
    lengths = CacheLengths.from_shards(blocks[i : i + per_shard] for i in range(0, len(blocks), per_shard))
    order = _order(lengths, 20, seed)
    wanted = row_order.epoch_rows(blocks, 20, seed, e)
    rows = [[(s * per_shard + b, i) for _, s, b, i in _refs(order, n)] for n in _epoch(order, e)]
    assert rows == wanted


@pytest.mark.parametrize(("per_block", "row_length"), [(30, 20), (3, 20), (200, 20), (9, 64)])
@pytest.mark.parametrize("seed", [None, 3])
def test_rows_of_many_segments_are_those_of_the_plain_lists(per_block: int, row_length: int, seed: int | None) -> None:
    random = np.random.default_rng(0)
    count = 4 * 256 * row_length // (per_block * row_length // 3)
    blocks = [random.integers(1, 2 * row_length // 3, per_block).tolist() for _ in range(count)]
    order = _order(CacheLengths.from_shards([blocks]), row_length, seed)
    assert len(order.counts) >= 3
    wanted = row_order.epoch_rows(blocks, row_length, seed, 1)
    assert [[(b, i) for _, _, b, i in _refs(order, n)] for n in _epoch(order, 1)] == wanted


def _order(lengths: CacheLengths, row_length: int, seed: int | None) -> CacheOrder:
    counted = counted_order(lengths, row_length)
    return CacheOrder(lengths, counted.segments, counted.counts, row_length, seed)


def _epoch(order: CacheOrder, number: int) -> range:
    return range(number * order.rows, (number + 1) * order.rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_length", [512, 2048, 8192])
def test_counting_side_by_side_finds_the_rows_that_packing_makes(kind: str, row_length: int) -> None:
    lengths = drawn_lengths(kind, row_length, 200)
    segments = Segments.from_lengths(lengths, row_length)
    edges, random = lengths.block_starts[segments.window_starts], np.random.default_rng(1)
    counts = np.concatenate(list(count_side_by_side(lengths, segments, row_length)))
    for number, (first, last) in enumerate(zip(segments.starts[:-1], segments.starts[1:], strict=True)):
        assert counts[number] == len(pack_segment(lengths, edges[first : last + 1], row_length, random))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_length", [256, 512, 1024, 2048, 4096, 8192])
def test_every_record_is_in_one_full_row_of_an_epoch(kind: str, row_length: int) -> None:
    lengths = drawn_lengths(kind, row_length, 192)
    order = _order(lengths, row_length, 5)
    for number in range(2):
        rows = [order.row(order.place(i)) for i in _epoch(order, number)]
        refs = list(chain.from_iterable(row.records for row in rows))
        assert len(refs) == len(set(refs)) == len(lengths.records)
        assert max(row.positions for row in rows) <= row_length
    # Conversations are too long for rows of 256: two of the short rests of cut ones seldom fill a row.
    fill = sum(row.positions for row in rows) / len(rows) / row_length
    assert fill >= (0.96 if (kind, row_length) == ("conversations", 256) else 0.97)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_length", [512, 2048, 8192])
def test_rows_of_a_large_cache_are_98_percent_full(kind: str, row_length: int) -> None:
    lengths = drawn_lengths(kind, row_length, 1500)
    order = counted_order(lengths, row_length)
    assert lengths.records.sum(dtype=np.int64) / order.rows / row_length >= 0.98


def test_epochs_and_seeds_differ_and_repeat() -> None:
    lengths = drawn_lengths("conversations", 512, 100)
    one, again, other = (_order(lengths, 512, seed) for seed in (0, 0, 1))
    first = [_refs(one, i) for i in range(100)]
    assert first == [_refs(again, i) for i in range(100)]
    assert first not in ([_refs(other, i) for i in range(100)], [_refs(one, one.rows + i) for i in range(100)])


def _mixed() -> MixedOrder:
    orders = [_order(drawn_lengths(kind, 512, blocks), 512, 2) for kind, blocks in zip(KINDS, (90, 40, 3), strict=True)]
    return MixedOrder(orders, [1 / 5, 1 / 2, 1.0])


@pytest.fixture(scope="module", params=["one", "small", "mixture"])
def order(request: pytest.FixtureRequest) -> RowOrder:
    if request.param == "mixture":
        return _mixed()
    return _order(drawn_lengths("conversations", 512, 1 if request.param == "small" else 120), 512, 2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64, 100])
def test_ranks_share_the_rows_of_a_step(order: RowOrder, ranks: int) -> None:
    for step in (range(64), range(1000, 1096), range(5000, 5007)):
        shares = [share_of_step(order, step, rank, ranks) for rank in range(ranks)]
        dealt = [share.places for share in shares if share.is_scored]
        in_turn = [places[turn] for turn in range(shares[0].most_rows) for places in dealt if turn < len(places)]
        assert in_turn == [order.place(i) for i in step]
        assert all(share.places for share in shares), "a rank needs a batch of something"


def test_a_run_that_goes_on_with_other_ranks_reads_every_record_once_an_epoch(order: RowOrder) -> None:
    """1 → 2 → 64 → 3 ranks, each for some steps, over and over until two epochs of each cache are behind."""
    seen, start, turns = set[Place](), 0, 0
    needed = max(int(2 * rows / share) for share, rows in order.shares) + 1000
    while start < needed:
        ranks, rows_per_step = ((1, 24), (2, 64), (64, 128), (3, 33))[turns % 4]
        for _ in range(5):
            step = range(start, start + rows_per_step)
            for rank in range(ranks):
                share = share_of_step(order, step, rank, ranks)
                assert not share.is_scored or not seen & set(share.places)
                seen |= set(share.places) if share.is_scored else set()
            start += rows_per_step
        turns += 1
    for part, cache in enumerate(order.orders):
        for epoch in range(2):
            own = [place for place in seen if (place.part, place.epoch) == (part, epoch)]
            refs = [ref for place in own for ref in cache.row(place).records]
            assert len(own) == cache.rows
            assert len(refs) == len(set(refs)) == len(cache.lengths.records)


@pytest.mark.parametrize(("kind", "bars"), [
    ("texts of 512", {1: 1.0, 8: 1.05, 64: 1.15, 256: 4.2}), ("conversations", {1: 1.3, 64: 1.4, 256: 5.5}),
])  # fmt: skip
def test_a_rank_reads_its_share(kind: str, bars: dict[int, float]) -> None:
    """1,024 blocks, so that a rank of 64 has 16. Those at both ends of its lane are read twice."""
    lengths = drawn_lengths(kind, 512, 1024)
    order = counted_order(lengths, 512)
    for ranks, most in bars.items():
        seen = read_as_rank(order, [lengths], range(order.rows), ranks - 1, ranks)
        assert seen.rows == len(range(ranks - 1, order.rows, ranks))
        assert seen.blocks * ranks / 1024 <= most, ranks
        # At most a block of each lane, and the rows that are carried.
        assert seen.most_held <= max(1, 64 // ranks) * (8192 + 8 * 512) * 1.3


def test_a_rank_reads_its_share_of_a_mixture() -> None:
    mixed = _mixed()
    rows, lengths = range(mixed.orders[0].rows), [each.lengths for each in mixed.orders]
    alone = read_as_rank(mixed, lengths, rows, 0, 1)
    shared = [read_as_rank(mixed, lengths, rows, rank, 8) for rank in range(8)]
    assert sum(seen.positions for seen in shared) == alone.positions
    assert sum(seen.blocks for seen in shared) <= 4 * alone.blocks < 8 * alone.blocks


def test_ten_million_rows_are_resumed_in_a_second_and_little_memory() -> None:
    rows, per_block = 10_000_000, 16
    blocks = rows // per_block
    lengths = CacheLengths(
        np.full(rows, 512, np.int16), np.arange(blocks + 1) * per_block, np.append(np.arange(0, blocks, 64), blocks)
    )
    segments = Segments.from_lengths(lengths, 512)
    counts = np.diff(lengths.block_starts[segments.window_starts[segments.starts]])
    tracemalloc.start()
    started = time.process_time()
    order = CacheOrder(lengths, segments, counts, 512, 0)
    cursor = 3 * rows + 4_567_890
    assert len({ref for i in range(cursor, cursor + 64) for ref in _refs(order, i)}) == 64
    assert time.process_time() - started < 2  # one on an idle core, without tracing of memory
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
