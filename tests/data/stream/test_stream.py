"""Order, packing and resuming: each record once an epoch, on any number of ranks, from any cursor."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.cache.manifest import read_manifest
from data.stream.collate import Collate
from data.stream.order import epoch_rows
from data.stream.pack import pack_rows
from data.stream.stream import Shards, all_batches, training_steps
from kd_core.errors import UsageError
from kd_core.types import Batch
from tests.tiny import ROW_LENGTH, Tiny

LENGTHS = st.lists(st.integers(1, 20), max_size=60)


@given(LENGTHS)
def test_packing_keeps_every_record_once_and_no_row_overflows(lengths: list[int]) -> None:
    rows = pack_rows(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 20 for row in rows)


@given(LENGTHS)
def test_no_two_rows_could_have_been_one_half_empty(lengths: list[int]) -> None:
    filled = [sum(lengths[i] for i in row) for row in pack_rows(lengths, 20)]
    assert sum(2 * fill <= 20 for fill in filled) <= 1


def test_a_record_longer_than_a_row_is_refused() -> None:
    with pytest.raises(UsageError, match=r"has 21 positions, a row 20"):
        pack_rows([3, 21], 20)


@given(st.lists(st.lists(LENGTHS, max_size=4), max_size=6), st.integers(0, 5), st.integers(0, 3), st.integers(1, 3))
def test_an_epoch_has_every_record_once_and_the_same_order_each_time(
    lengths: list[list[list[int]]], seed: int, epoch: int, window: int
) -> None:
    rows = epoch_rows(lengths, 20, seed, epoch, window)
    refs = [
        (shard, block, index)
        for shard, blocks in enumerate(lengths)
        for block, records in enumerate(blocks)
        for index in range(len(records))
    ]
    assert sorted(ref for row in rows for ref in row.records) == refs
    assert rows == epoch_rows(lengths, 20, seed, epoch, window)
    assert all({ref[:2] for ref in row.records} <= row.window and len(row.window) <= window for row in rows)


def test_a_shard_is_gone_through_once_from_its_beginning() -> None:
    lengths = [[[4] * 3] * blocks for blocks in (3, 1, 5, 2)]
    seen: list[frozenset[tuple[int, int]]] = []
    for row in epoch_rows(lengths, 8, 1, 0, 2):
        if not seen or row.window != seen[-1]:
            seen.append(row.window)
    assert len(seen) == len(set(seen)), "a window came back after another"
    for shard, blocks in enumerate(lengths):
        assert [block for window in seen for of, block in window if of == shard] == list(range(len(blocks)))


def test_epochs_and_seeds_differ() -> None:
    lengths = [[[4] * 10]] * 3
    assert epoch_rows(lengths, 8, 0, 0, 2) != epoch_rows(lengths, 8, 0, 1, 2)
    assert epoch_rows(lengths, 8, 0, 0, 2) != epoch_rows(lengths, 8, 1, 0, 2)


def _steps(tiny: Tiny, start_row: int, count: int, rank: int = 0, ranks: int = 1) -> list[list[Batch]]:
    steps = training_steps(
        Shards(str(tiny.train), shuffle_shards=2),
        Collate(ROW_LENGTH),
        seed=3,
        start_row=start_row,
        rows_per_step=6,
        micro_batch=2,
        rank=rank,
        ranks=ranks,
    )
    return list(islice(steps, count))


def _names(step: list[Batch]) -> list[str]:
    return [name for batch in step for name in batch.record_names]


def test_a_cursor_goes_on_where_it_stood_also_in_a_later_epoch(tiny: Tiny) -> None:
    whole = _steps(tiny, 0, 12)
    epoch = len(Shards(str(tiny.train), shuffle_shards=2).rows(ROW_LENGTH, 3, 0))
    assert 2 * epoch < 12 * 6, "the test should cross an epoch's end"
    for done in (1, 5, 11):
        resumed = _steps(tiny, done * 6, 12 - done)
        assert [_names(step) for step in resumed] == [_names(step) for step in whole[done:]]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_same_global_step(tiny: Tiny, ranks: int) -> None:
    alone = _steps(tiny, 0, 4)
    shared = [_steps(tiny, 0, 4, rank, ranks) for rank in range(ranks)]
    for number, step in enumerate(alone):
        names = [name for rank in range(ranks) for name in _names(shared[rank][number])]
        assert sorted(names) == sorted(_names(step))


def test_evaluation_reads_every_record_once_over_any_ranks(tiny: Tiny) -> None:
    manifest = read_manifest(tiny.validation)
    for ranks in (1, 3):
        names = [
            name
            for rank in range(ranks)
            for batch in all_batches(
                Shards(str(tiny.validation)), Collate(ROW_LENGTH), micro_batch=2, rank=rank, ranks=ranks
            )
            for name in batch.record_names
        ]
        assert len(names) == len(set(names)) == manifest.records


def test_a_batch_holds_what_the_records_hold(tiny: Tiny) -> None:
    one, two, three = tiny.records()[:3]
    batch = Collate(96)([[one, two], [three.cut(5)]])
    assert batch.tokens.shape == (2, 96)
    assert batch.topk_log_probs.shape == (2, 96, 8)
    at = slice(one.positions, one.positions + two.positions)
    assert batch.tokens[0, at].tolist() == two.token_ids[:-1].tolist()
    assert batch.labels[0, at].tolist() == two.token_ids[1:].tolist()
    assert batch.position_ids[0, at].tolist() == list(range(two.positions))
    assert batch.topk_token_ids[0, at].tolist() == two.topk_token_ids.tolist()
    assert (batch.document_ids[0, at] == 1).all()
    end = one.positions + two.positions
    assert not batch.loss_mask[0, end:].any()
    assert (batch.document_ids[0, end:] == -1).all()
    unused = batch.topk_log_probs[1, : three.positions, 5:]
    assert (unused == -torch.inf).all()
