"""Batches of evaluation and what they hold, on any number of ranks."""

import torch

from data.cache.manifest import read_manifest
from data.stream.collate import Collate
from data.stream.source import Shards
from data.stream.stream import all_batches
from tests.tiny import ROW_LENGTH, Tiny


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
