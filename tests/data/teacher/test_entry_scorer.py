"""Scores from entries alone, against float64 sums over the whole distribution."""

import numpy as np
import pytest
import torch

from data.cache.selection import Selection
from data.teacher.entry_scorer import SMALLEST_TAIL, select_from_entries

N, V, K = 200, 500, 12


def _distribution(scale: float, columns: int = V) -> np.ndarray:
    """Log-probabilities [N, columns] of random logits, which are the more peaked the larger the scale."""
    logits = np.random.default_rng(0).normal(size=(N, columns)) * scale
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _entries(log_probs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The K likeliest of each position, rounded to float32 as an engine does, in rising order."""
    ids = np.argsort(log_probs, axis=1)[:, -K:]
    return torch.from_numpy(ids), torch.from_numpy(np.take_along_axis(log_probs, ids, 1).astype(np.float32)).double()


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize(
    "selection", [Selection(K), Selection(K, min_prob=0.02), Selection(K, mass=0.5), Selection(K, 0.01, 0.8)]
)
def test_entries_tail_and_limits_are_those_of_the_distribution(scale: float, selection: Selection) -> None:
    log_probs = _distribution(scale)
    labels = torch.from_numpy(log_probs[:, 7])
    scores = select_from_entries(*_entries(log_probs), labels, selection, V)
    probs = np.exp(log_probs)
    for i in range(N):
        # Keep entries one after the other, as the settings describe them.
        kept: list[int] = []
        for token in np.argsort(-log_probs[i])[:K]:
            if probs[i, token] >= selection.min_prob and probs[i, kept].sum() < selection.mass:
                kept.append(int(token))
        used = scores.log_probs[i] > -torch.inf
        assert scores.ids[i][used].tolist() == kept
        np.testing.assert_allclose(scores.log_probs[i][used], log_probs[i, kept], atol=1e-6)
        tail = np.delete(probs[i], kept).sum()
        assert abs(np.exp(scores.tail_log_prob[i].double().item()) - tail) <= SMALLEST_TAIL + 1e-7
    np.testing.assert_allclose(scores.label_log_prob, labels.float(), atol=1e-6)


def test_a_tail_is_never_larger_than_the_last_entry_allows() -> None:
    """Distributions whose Σp is 1 in float32: the tail is below the error of the sum."""
    log_probs = _distribution(60.0)
    scores = select_from_entries(*_entries(log_probs), torch.zeros(N).double(), Selection(K), V)
    largest = np.log(V - K) + np.sort(log_probs, axis=1)[:, -K]
    assert (scores.tail_log_prob.numpy() <= largest + 1e-4).all()
    assert (scores.tail_log_prob.exp() <= SMALLEST_TAIL * 1.01).float().mean() > 0.5


def test_padding_columns_take_no_probability() -> None:
    wide = _distribution(2.0, V + 14)
    real = wide[:, :V] - np.log(np.exp(wide[:, :V]).sum(axis=1, keepdims=True))
    ids, log_probs = _entries(wide)
    assert (ids >= V).any()
    scores = select_from_entries(ids, log_probs, torch.from_numpy(wide[:, 3]), Selection(K), V)
    used = (scores.log_probs > -torch.inf).numpy()
    assert (scores.ids[torch.from_numpy(used)] < V).all()
    assert (used.sum(axis=1) == (ids.numpy() < V).sum(axis=1)).all()
    padding = np.exp(wide[:, V:]).sum(axis=1)
    # Padding among the entries is divided out. Padding in the tail cannot be told apart, and stays there.
    expected = np.take_along_axis(real, scores.ids.numpy(), 1)
    difference = np.where(used, scores.log_probs.numpy() - expected, 0)
    assert (difference <= 1e-6).all()
    assert (difference >= np.log1p(-padding)[:, None] - 1e-6).all()
    np.testing.assert_allclose(scores.log_probs.exp().sum(dim=1) + scores.tail_log_prob.exp(), 1, atol=1e-5)
