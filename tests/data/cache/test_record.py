"""A record over fewer columns: what padding columns held goes to the tokens, in the proportions that they have."""

from dataclasses import replace

import numpy as np
import pytest

from data.cache.record import Record

NONE = -np.inf
WIDE = Record(
    name="0",
    document="d",
    start=0,
    token_ids=np.array([1, 2, 3]),
    loss_mask=np.ones(2, np.uint8),
    topk_token_ids=np.array([[2, 9], [3, 4]]),
    topk_log_probs=np.log([[0.5, 0.008], [0.6, 0.1]]),
    tail_log_prob=np.log([0.492, 0.3]),
    label_log_prob=np.log([0.5, 0.6]),
    tempered_tails={2.0: np.log([3.0, 2.0])},
    sampled_token_ids=np.array([[5, 8, 6], [6, 7, 5]]),
    sampled_log_weights=np.log([[0.246, 0.123, 0.123], [0.1, 0.1, 0.1]]),
)


def test_padding_leaves_its_mass_to_the_tokens() -> None:
    """Of 10 columns, 8 are tokens; the first position has an entry and a sample of padding, the second none."""
    found, left = WIDE.within(8), np.array([1 - 0.008, 1.0])
    np.testing.assert_array_equal(found.topk_token_ids, [[2, 0], [3, 4]])
    np.testing.assert_allclose(np.exp(found.topk_log_probs), [[0.5 / 0.992, 0], [0.6, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(found.tail_log_prob), np.array([0.492, 0.3]) / left, rtol=1e-6)
    np.testing.assert_allclose(np.exp(found.label_log_prob), np.array([0.5, 0.6]) / left, rtol=1e-6)
    # Σ p^(1/τ) of the tail: each p is divided by what is left, and then raised.
    np.testing.assert_allclose(np.exp(found.tempered_tails[2.0]), np.array([3.0, 2.0]) / left**0.5, rtol=1e-6)
    samples, weights = found.samples()
    np.testing.assert_array_equal(samples, [[5, 0, 6], [6, 7, 5]])
    np.testing.assert_allclose(np.exp(weights[0]), np.array([0.328, 0, 0.164]) / 0.992, rtol=1e-6)
    for logs in (found.topk_log_probs, weights):
        assert logs.dtype == np.float32
    whole = np.exp(found.topk_log_probs).sum(1) + np.exp(weights).sum(1)
    np.testing.assert_allclose(whole, 1, rtol=1e-6)


def test_a_record_without_padding_is_not_touched() -> None:
    assert WIDE.within(10) is WIDE
    bare = replace(WIDE.without_samples(), topk_token_ids=np.array([[2, 7], [3, 4]]))
    assert bare.within(8) is bare
    assert WIDE.without_samples().within(8).sampled_token_ids is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.array([1, 2, 8])}, "token 8"),
        ({"topk_log_probs": np.log([[0.5, 0.02], [0.6, 0.1]])}, "ids from 8 on have a probability of 0.020"),
        ({"sampled_token_ids": np.array([[8, 8, 9], [6, 7, 5]])}, "all samples of a position are ids from 8 on"),
    ],
)
def test_what_is_no_padding_is_refused(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(WIDE, **changes).within(8)
