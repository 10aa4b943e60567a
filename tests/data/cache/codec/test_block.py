"""Whatever a teacher says comes back from a block: ids to the last one, log-probabilities within the stated error."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cache.codec.block import decode_block, encode_block
from data.cache.codec.levels import STEPS
from data.cache.record import UNUSED, Record
from data.cache.selection import Selection
from tests.data.cache.codec.randoms import Case, by_id, make

SELECTIONS = [
    Selection(top_k=1),
    Selection(top_k=4),
    Selection(top_k=64),
    Selection(top_k=9, min_prob=0.01),
    Selection(top_k=17, mass=0.9, tail_temperatures=(2.0,)),
    Selection(top_k=3, draws=5),
    Selection(top_k=0, draws=6),
    Selection(top_k=0, draws=300),
    Selection(top_k=0, draws=7, proposal_temperature=1.5),
    Selection(top_k=8, draws=4, proposal_temperature=0.7, tail_temperatures=(0.5, 2.0, 4.0)),
]
DOCUMENTS = st.text(max_size=30)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    selection = draw(st.sampled_from(SELECTIONS))
    return Case(
        seed=draw(st.integers(0, 1 << 30)),
        vocab=draw(st.sampled_from([5, 12, 255, 256, 257, 5000, 65_536, 65_537, 70_000])),
        lengths=tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))),
        selection=selection,
        codec=draw(st.sampled_from(["standard", "compact", "lossless"])),
        scale=draw(st.sampled_from([0.1, 1.0, 5.0, 40.0, 3000.0])),
        document=draw(DOCUMENTS),
        ragged=not selection.fixed or draw(st.booleans()),
        pilot_weight=draw(st.sampled_from([1, 10_000])),
    )


def _exact(before: Record, after: Record) -> None:
    assert (before.name, before.document, before.start) == (after.name, after.document, after.start)
    assert np.array_equal(before.token_ids, after.token_ids)
    assert np.array_equal(before.loss_mask, after.loss_mask)


@given(case=cases())
@settings(max_examples=120, deadline=None)
def test_a_block_comes_back(case: Case) -> None:
    records, coding = make(case)
    members, audit = encode_block(0, records, coding)
    assert encode_block(0, records, coding)[0] == members, "the bytes depend on the records alone"
    again = decode_block(members, coding)
    assert len(again) == len(records)
    for before, after in zip(records, again, strict=True):
        _exact(before, after)
        heads, heads_after = (by_id(r.topk_token_ids, r.topk_log_probs) for r in (before, after))
        samples, samples_after = (by_id(*r.samples()) for r in (before, after))
        assert [[i for i, _ in row] for row in heads] == [[i for i, _ in row] for row in heads_after]
        assert [[i for i, _ in row] for row in samples] == [[i for i, _ in row] for row in samples_after]
        if case.codec == "lossless":
            assert heads == heads_after
            for name in ("tail_log_prob", "label_log_prob"):
                assert np.array_equal(getattr(before, name), getattr(after, name))
            assert all(np.array_equal(before.tempered_tails[t], after.tempered_tails[t]) for t in before.tempered_tails)
        else:
            _close(before, after, heads, heads_after, STEPS[case.codec])
    assert audit["kl_worst"] <= (_bound(records[0].topk_token_ids.shape[1], case) if case.codec != "lossless" else 0)


def _bound(entries: int, case: Case) -> float:
    """KL of a position: 2 (Δ√p)² an entry, at most half a step off, those four above 0.45 three times as much."""
    return (entries / 2 + 36) * STEPS[case.codec] ** 2 + 1e-5


def _close(before: Record, after: Record, heads: list, heads_after: list, step: float) -> None:
    mass = np.exp(after.topk_log_probs.astype(np.float64)).sum(1) + np.exp(after.tail_log_prob.astype(np.float64))
    assert np.abs(mass - 1).max() < 1e-5
    assert ((before.tail_log_prob == UNUSED) == (after.tail_log_prob == UNUSED)).all()
    for row, row_after in zip(heads, heads_after, strict=True):
        for (_, log), (_, log_after) in zip(row, row_after, strict=True):
            # Half a step, a whole one where the likeliest is kept apart; scaling to 1 adds the errors of all others.
            assert abs(np.exp(log / 2) - np.exp(log_after / 2)) <= 3 * step + 0.5 * step * len(row) ** 0.5
        best = max(row, key=lambda entry: entry[1], default=None)
        if best and sum(log == best[1] for _, log in row) == 1:
            assert max(row_after, key=lambda entry: entry[1])[0] == best[0]
            assert sum(log == dict(row_after)[best[0]] for _, log in row_after) == 1, "no tie at the top"
    for temperature, tail in before.tempered_tails.items():
        assert np.abs(after.tempered_tails[temperature] - tail).max() <= 1 / 512 + 1e-4
    inside = (before.topk_token_ids == before.token_ids[1:, None]) & (before.topk_log_probs > UNUSED)
    outside = ~inside.any(axis=1) & (before.label_log_prob > -239)
    assert np.abs(after.label_log_prob[outside] - before.label_log_prob[outside]).max(initial=0) <= 1 / 512 + 1e-4
    own = (after.topk_token_ids == after.token_ids[1:, None]) & (after.topk_log_probs > UNUSED)
    for at in np.flatnonzero(own.any(axis=1)):
        assert after.label_log_prob[at] == after.topk_log_probs[at][own[at]][0], "one rule for entry and label"


@pytest.mark.parametrize(("codec", "bound"), [("standard", 1.5e-4), ("compact", 3.3e-4)])
def test_at_64_entries_the_mean_kl_is_what_the_codec_promises(codec: str, bound: float) -> None:
    records, coding = make(Case(7, 3000, (400, 400), Selection(top_k=64), codec, 2.5))
    assert encode_block(0, records, coding)[1]["kl_mean"] < bound


def test_a_window_of_thousands_of_positions_beside_one_of_a_single_one() -> None:
    case = Case(5, 400, (1, 5000, 1), Selection(top_k=5, mass=0.9), "standard", 3.0, ragged=True)
    records, coding = make(case)
    again = decode_block(encode_block(0, records, coding)[0], coding)
    assert [record.positions for record in again] == [1, 5000, 1]
    for before, after in zip(records, again, strict=True):
        _exact(before, after)


def test_a_vocabulary_of_three_bytes() -> None:
    case = Case(3, 300_000, (9, 1, 30), Selection(top_k=12, draws=3), "standard", 2.0, ragged=True)
    records, coding = make(case)
    for before, after in zip(records, decode_block(encode_block(0, records, coding)[0], coding), strict=True):
        _exact(before, after)


def _one(**changes: object) -> Record:
    records, _ = make(Case(1, 50, (6,), Selection(top_k=4), "lossless", 1.0))
    return dataclasses.replace(records[0], **changes)


def _touched(name: str, at: tuple[int, ...] | int, value: float) -> Record:
    array = getattr(_one(), name).copy()
    array[at] = value
    return _one(**{name: array})


MISTAKES = [
    (_touched("topk_log_probs", (2, 1), np.nan), "entry_logs: holds NaN"),
    (_touched("tail_log_prob", 3, np.nan), "tail: holds NaN"),
    (_touched("label_log_prob", 0, np.nan), "label_logs: holds NaN"),
    (_touched("topk_log_probs", (2, 1), 0.5), "log-probability above 0"),
    (_touched("tail_log_prob", 3, -0.001), "entries and tail sum to"),
    (_touched("topk_token_ids", (0, 0), 50), "entry_ids: ids"),
    (_touched("topk_token_ids", (0, 0), -1), "entry_ids: ids"),
    (_touched("token_ids", 0, 50), "tokens: ids"),
    (_touched("token_ids", 6, 1 << 30), "labels: ids"),
]


@pytest.mark.parametrize(("record", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_no_teacher_can_have_said_is_refused(record: Record, message: str) -> None:
    _, coding = make(Case(1, 50, (6,), Selection(top_k=4), "lossless", 1.0))
    with pytest.raises(ValueError, match=message):
        encode_block(0, [record], coding)


def test_an_id_that_stands_twice_is_refused() -> None:
    record, coding = _one(), make(Case(1, 50, (6,), Selection(top_k=4), "lossless", 1.0))[1]
    ids = record.topk_token_ids.copy()
    ids[2, 0] = ids[2, 3]
    twice = dataclasses.replace(record, topk_token_ids=ids, token_ids=np.full(7, 49, np.int32))
    twice = dataclasses.replace(twice, token_ids=np.array([*[_absent(ids)] * 7], np.int32))
    with pytest.raises(ValueError, match="position 2 has the same id twice"):
        encode_block(0, [twice], coding)


def _absent(ids: np.ndarray) -> int:
    return min(set(range(50)) - set(ids.ravel().tolist()))


def test_a_label_that_disagrees_with_its_entry_is_refused() -> None:
    record, coding = _one(), make(Case(1, 50, (6,), Selection(top_k=4), "lossless", 1.0))[1]
    tokens = record.token_ids.copy()
    tokens[3] = record.topk_token_ids[2, 0]
    own = record.label_log_prob.copy()
    own[2] = record.topk_log_probs[2, 0] - 0.1
    with pytest.raises(ValueError, match="position 2: the label's log-probability"):
        encode_block(0, [dataclasses.replace(record, token_ids=tokens, label_log_prob=own)], coding)


def test_samples_of_more_draws_than_were_made_are_refused() -> None:
    records, coding = make(Case(1, 50, (6,), Selection(top_k=0, draws=4), "standard", 1.0))
    heavy = dataclasses.replace(records[0], sampled_log_weights=records[0].sampled_log_weights + np.float32(2))
    with pytest.raises(ValueError, match="not 1 to 4 draws"):
        encode_block(0, [heavy], coding)
