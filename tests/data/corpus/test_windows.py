"""Windows over any document: each label that is to be scored is scored exactly once, with its context before it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.corpus.corpus import Corpus
from data.corpus.encoding import Encoded
from data.corpus.windows import cut_windows
from data.export.plan import make_plans
from kd_core.errors import UsageError
from tests.tiny import ROW_LENGTH, Tiny


@given(
    wanted=st.lists(st.booleans(), max_size=60),
    row_length=st.integers(1, 16),
    share=st.floats(0, 1, exclude_max=True),
)
def test_each_wanted_label_is_scored_exactly_once(wanted: list[bool], row_length: int, share: float) -> None:
    overlap = int(row_length * share)
    ids = np.arange(len(wanted) + 1, dtype=np.int32)
    document = Encoded("d", ids, np.asarray(wanted, np.uint8))
    times = np.zeros(len(wanted), int)
    for window in cut_windows([document], row_length, overlap):
        assert 1 <= window.positions <= row_length
        assert window.loss_mask.any()
        assert (window.token_ids == ids[window.start : window.start + window.positions + 1]).all()
        assert window.start == 0 or not window.loss_mask[:overlap].any()
        times[window.start : window.start + window.positions] += window.loss_mask
    assert times.tolist() == [int(want) for want in wanted]


def test_the_example_of_the_docstring() -> None:
    document = Encoded("d", np.arange(9, dtype=np.int32), np.ones(8, np.uint8))
    found = [(w.start, w.token_ids.tolist(), w.loss_mask.tolist()) for w in cut_windows([document], 4, 2)]
    assert found == [
        (0, [0, 1, 2, 3, 4], [1, 1, 1, 1]),
        (2, [2, 3, 4, 5, 6], [0, 0, 1, 1]),
        (4, [4, 5, 6, 7, 8], [0, 0, 1, 1]),
    ]


def test_no_document_and_one_of_a_single_token_have_no_window() -> None:
    documents = [Encoded("d", np.arange(n, dtype=np.int32), np.ones(max(0, n - 1), np.uint8)) for n in (0, 1)]
    assert list(cut_windows(documents, 4, 2)) == []


@pytest.mark.parametrize("overlap", [-1, ROW_LENGTH])
def test_an_overlap_that_leaves_nothing_is_refused(tiny: Tiny, overlap: int) -> None:
    with pytest.raises(UsageError, match=f"overlap: got {overlap}; wanted 0 to {ROW_LENGTH - 1}"):
        tiny.export(overlap=overlap)


def test_another_overlap_is_another_plan(tiny: Tiny) -> None:
    plain, lapped = (make_plans(tiny.export(overlap=overlap), tiny.root / "unused")[0] for overlap in (0, 8))
    assert plain.identity != lapped.identity
    assert sum(int(w.loss_mask.sum()) for w in plain.windows) == sum(int(w.loss_mask.sum()) for w in lapped.windows)
    assert len(lapped.windows) > len(plain.windows)


@pytest.mark.parametrize("change", [{"text_field": "body"}, {"content": "text"}])
def test_another_way_to_read_the_corpus_is_another_plan(tiny: Tiny, change: dict[str, str]) -> None:
    changed = Corpus(str(tiny.corpus), **change)
    plans = [make_plans(tiny.export(corpus=corpus), tiny.root / "unused")[0].identity for corpus in
             (Corpus(str(tiny.corpus)), changed)]  # fmt: skip
    assert plans[0]["corpus"] != plans[1]["corpus"]
