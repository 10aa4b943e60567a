"""Order, packing and resuming: each record once an epoch, on any number of ranks, from any cursor."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.cache.manifest import read_manifest
from data.stream.collate import Collate
from data.stream.order import epoch_rows
from data.stream.packing import pack_rows
from data.stream.source import Shards
from data.stream.stream import all_batches
from kd_core.errors import UsageError
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
    rows = list(epoch_rows(lengths, 20, seed, epoch, window))
    refs = [
        (shard, block, index)
        for shard, blocks in enumerate(lengths)
        for block, records in enumerate(blocks)
        for index in range(len(records))
    ]
    assert sorted(ref for row in rows for ref in row.records) == refs
    assert rows == list(epoch_rows(lengths, 20, seed, epoch, window))
    assert all({ref[:2] for ref in row.records} <= row.window for row in rows)
    assert all(sum(lengths[s][b][i] for s, b, i in row.records) == row.positions <= 20 for row in rows)


def test_a_shard_is_gone_through_once_from_its_beginning() -> None:
    lengths = [[[4] * 3] * blocks for blocks in (3, 1, 5, 2)]
    held: frozenset[tuple[int, int]] = frozenset()
    read: list[tuple[int, int]] = []
    for row in epoch_rows(lengths, 9, 1, 0, 2):
        read += sorted(row.window - held)
        held = row.window
        assert len(held) <= 5, "more than two windows are held"
    assert len(read) == len(set(read)), "a block is read twice"
    for shard, blocks in enumerate(lengths):
        assert [block for of, block in read if of == shard] == list(range(len(blocks)))


def test_epochs_and_seeds_differ() -> None:
    lengths = [[[4] * 10]] * 3
    one, other_epoch, other_seed = (list(epoch_rows(lengths, 8, *of, 2)) for of in ((0, 0), (0, 1), (1, 0)))
    assert one not in (other_epoch, other_seed)


@pytest.mark.parametrize("row_length", [512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize(("median", "spread"), [(60, 1.0), (200, 1.0), (300, 0.7), (600, 0.8)])
def test_rows_of_short_documents_are_98_percent_full(row_length: int, median: int, spread: float) -> None:
    """32 shards of 3 blocks of about 8,192 positions; documents that are too long are windowed, as the export does."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), spread, 30_000).astype(int).clip(2)
    pieces = (min(row_length, d - at) for d in drawn.tolist() for at in range(0, d, row_length))
    lengths: list[list[list[int]]] = [[[] for _ in range(3)] for _ in range(32)]
    for block in (block for shard in lengths for block in shard):
        while sum(block) < 8192:
            block.append(next(pieces))
    rows = list(epoch_rows(lengths, row_length, 0, 0, 16))
    fill = sum(row.positions for row in rows) / len(rows) / row_length
    assert fill >= 0.98


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
