"""What a cache keeps of a teacher's distribution, from logits of the whole vocabulary in float64, token by token."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from data.cache.selection import Selection
from data.teacher.select import TeacherScores


@dataclass
class DenseScores:
    """One position: the entries' ids, and log-probabilities in nats. `cdf` is over the tail's proposal, by id."""

    ids: set[int]
    log_probs: np.ndarray  # of all V tokens
    tail: float
    tempered: list[float]
    cdf: np.ndarray


def dense_scores(logits: np.ndarray, selection: Selection) -> DenseScores:
    """The scores of one position from its V logits."""
    logits = logits.astype(np.float64)
    log_probs = logits - np.logaddexp.reduce(logits)
    ids: set[int] = set()
    mass = 0.0
    for token in sorted(range(len(logits)), key=lambda v: (-log_probs[v], v))[: selection.top_k]:
        probability = np.exp(log_probs[token])
        if probability < selection.min_prob or mass >= selection.mass:
            break
        ids.add(token)
        mass += probability
    rest = np.array([v not in ids for v in range(len(logits))])
    tempered = [float(np.logaddexp.reduce(log_probs[rest] / t)) for t in selection.tail_temperatures]
    weights = np.where(rest, np.exp(log_probs / selection.proposal_temperature), 0.0)
    return DenseScores(ids, log_probs, float(np.logaddexp.reduce(log_probs[rest])), tempered, np.cumsum(weights))


def drawn_ids(scores: DenseScores, uniforms: np.ndarray) -> tuple[list[int], float]:
    """The distinct ids that uniform numbers draw, in rising order, and the smallest distance to a neighbour's share."""
    shares = scores.cdf / scores.cdf[-1]
    edges = np.concatenate([[0.0], shares])
    distance = min((float(np.abs(edges - u).min()) for u in uniforms), default=1.0)
    return sorted({int(np.searchsorted(shares, u, side="right")) for u in uniforms}), distance


def check_scores(
    scores: TeacherScores, logits: Tensor, labels: Tensor, uniforms: Tensor, selection: Selection, error: float
) -> None:
    """Compare all that is kept of N positions with their logits [N, V]; `error` in nats is that of the scores."""
    for row, values in enumerate(logits.double().numpy()):
        truth = dense_scores(values, selection)
        used = scores.log_probs[row] > -np.inf
        ids = scores.ids[row][used].tolist()
        assert len(set(ids)) == len(ids) == len(truth.ids)
        # Logits that differ by less than the error may be swapped.
        np.testing.assert_allclose(sorted(values[ids]), sorted(values[list(truth.ids)]), atol=error, rtol=0)
        close = {"atol": error, "rtol": 0}
        np.testing.assert_allclose(scores.log_probs[row][used].numpy(), truth.log_probs[ids], **close)
        np.testing.assert_allclose(scores.tail_log_prob[row].item(), truth.tail, **close)
        np.testing.assert_allclose(scores.tempered_tails[row].numpy(), truth.tempered, **close)
        np.testing.assert_allclose(scores.label_log_prob[row].item(), truth.log_probs[labels[row]], **close)
        drawn = scores.sampled_ids[row][scores.sampled_log_weights[row] > -np.inf].tolist()
        expected, distance = drawn_ids(truth, uniforms[row].numpy())
        if set(ids) == truth.ids and distance > error:
            assert drawn == expected
