"""What ends with a document, each setting on its own; padding; and that the decoder obeys."""

import numpy as np
import pytest
import torch

from data.cache.record import UNUSED, Record
from data.stream.collate import Collate
from kd_core.errors import UsageError
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.types import Batch
from tests.tiny import Tiny

EOD = 9


def _record(*tokens: int, K: int = 2, draws: int = 0) -> Record:
    """A record of these tokens, the last of which is a label only."""
    n = len(tokens) - 1
    return Record(
        "r", "d", 0, np.array(tokens, np.int32), np.ones(n, np.uint8), np.full((n, K), 1, np.int32),
        np.full((n, K), -1.0, np.float32), np.full(n, -2.0, np.float32), np.full(n, -1.0, np.float32),
        sampled_token_ids=np.full((n, draws), 3, np.int32) if draws else None,
        sampled_log_weights=np.full((n, draws), -0.5, np.float32) if draws else None,
    )  # fmt: skip


# Two records of a row of 10: the first has an end-of-document token inside, the second ends with one.
ROW = [_record(1, 2, EOD, 3, 4), _record(5, 6, EOD)]
POSITIONS = {
    (True, False): [0, 1, 2, 3, 0, 1, 0, 0, 0, 0],
    (True, True): [0, 1, 2, 0, 0, 1, 0, 0, 0, 0],
    (False, False): [0, 1, 2, 3, 4, 5, 0, 0, 0, 0],
    (False, True): [0, 1, 2, 3, 4, 5, 0, 0, 0, 0],
}
DOCUMENTS = {
    (True, False): [0, 0, 0, 0, 1, 1, -1, -1, -1, -1],
    (True, True): [0, 0, 0, 1, 2, 2, -1, -1, -1, -1],
    (False, False): [0, 0, 0, 0, 0, 0, -1, -1, -1, -1],
    (False, True): [0, 0, 0, 0, 0, 0, -1, -1, -1, -1],
}


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_each_setting_does_its_own_and_nothing_else(positions: bool, attention: bool, mask: bool, inside: bool) -> None:
    if mask and not inside:
        with pytest.raises(UsageError, match="wanted collate.eod_id"):
            Collate(10, eod_mask_loss=True)
        return
    batch = Collate(
        10,
        reset_position_ids=positions,
        reset_attention_mask=attention,
        eod_mask_loss=mask,
        eod_id=EOD if inside else None,
    )([ROW])
    assert batch.tokens[0].tolist() == [1, 2, EOD, 3, 5, 6, 0, 0, 0, 0]
    assert batch.labels[0].tolist() == [2, EOD, 3, 4, 6, EOD, 0, 0, 0, 0]
    assert batch.position_ids[0].tolist() == POSITIONS[positions, inside]
    assert batch.document_ids[0].tolist() == DOCUMENTS[attention, inside]
    assert batch.loss_mask[0].int().tolist() == [1, 1, int(not mask), 1, 1, 1, 0, 0, 0, 0]


def test_padding_of_the_id_of_a_documents_end_ends_nothing() -> None:
    batch = Collate(4, eod_id=0, eod_mask_loss=True)([[_record(1, 2, 3)]])
    assert batch.document_ids[0].tolist() == [0, 0, -1, -1]
    assert batch.position_ids[0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "length"),
    [({}, 10), ({"padding": "longest"}, 6), ({"padding": "longest", "multiple": 4}, 8), ({"multiple": 8}, 16)],
)
def test_rows_are_padded_to_what_is_asked_for(settings: dict[str, object], length: int) -> None:
    batch = Collate(10, **settings)([ROW, ROW[1:]])  # type: ignore[arg-type]
    assert batch.tokens.shape == (2, length)
    unused = batch.document_ids < 0
    assert not batch.loss_mask[unused].any()
    assert (batch.topk_log_probs[unused] == -torch.inf).all()
    assert (batch.topk_token_ids[unused] == 0).all()


def test_rows_of_nothing_are_padding() -> None:
    for padding in ("row_length", "longest"):
        batch = Collate(10, padding)([[], []])
        assert (batch.document_ids == -1).all()
        assert not batch.loss_mask.any()


def test_records_of_other_widths_share_a_row() -> None:
    batch = Collate(10)([[_record(1, 2, 3, K=1), _record(1, 2, 3, K=2, draws=2), _record(1, 2, K=0, draws=1)]])
    assert batch.topk_log_probs.shape == (1, 10, 4)
    used = batch.topk_log_probs[0].exp()
    head, draw = float(np.exp(np.float32(-1))), float(np.exp(np.float32(-0.5)))
    assert torch.allclose(used[0], torch.tensor([head, 0, 0, 0]))
    assert torch.allclose(used[2], torch.tensor([head, head, draw, draw]))
    assert torch.allclose(used[4], torch.tensor([draw, 0, 0, 0]))
    assert batch.tail_log_prob[0, :5].tolist() == [-2, -2, UNUSED, UNUSED, UNUSED]


def _logits(model: Decoder, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch.tokens, batch.position_ids, batch.document_ids)


@pytest.mark.parametrize("reset", [True, False])
def test_the_decoder_obeys(tiny: Tiny, reset: bool) -> None:
    """Another first document changes the second one's logits only where the second may see it."""
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    collate = Collate(12, reset_attention_mask=reset)
    second = _record(11, 12, 13, 14, 15)
    one, other = (_logits(model, collate([[_record(*first, 7), second]])) for first in ((1, 2, 3), (4, 2, 3)))
    assert not torch.equal(one[0, :3], other[0, :3])
    assert torch.equal(one[0, 3:7], other[0, 3:7]) == reset
    alone = _logits(model, collate([[second]]))
    assert torch.allclose(one[0, 3:7], alone[0, :4], atol=1e-5) == reset
