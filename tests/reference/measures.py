"""What an evaluation measures once more, plainly, in float64: every position by itself, from log q over all of V.
Imports nothing of ours but the other oracle.
"""

import math

import torch

from tests.reference import dense
from tests.reference.dense import Position


def _sum(values: list[float]) -> float:
    return math.fsum(values)


def likeliest(position: Position) -> int:
    return max(range(len(position.log_q)), key=lambda token: float(position.log_q[token]))


def teachers(position: Position, count: int) -> list[int]:
    """The `count` likeliest, and those that are as likely as the last of them."""
    last = sorted((p for _, p in position.entries), reverse=True)[:count][-1]
    return [token for token, p in position.entries if p >= last]


def calibration_error(positions: list[Position], bins: int = 15) -> float:
    """By bin: positions whose confidence is in it, their mean confidence, and how many are right."""
    error = 0.0
    for b in range(bins):
        confidences, right = [], 0
        for each in positions:
            token = likeliest(each)
            confidence = math.exp(float(each.log_q[token]))
            if b / bins < confidence <= (b + 1) / bins:
                confidences.append(confidence)
                right += token == each.label
        if confidences:
            mean, accuracy = _sum(confidences) / len(confidences), right / len(confidences)
            error += len(confidences) / len(positions) * abs(accuracy - mean)
    return error


def nll(positions: list[Position], temperature: float = 1.0) -> float:
    return _sum([-float((each.log_q / temperature).log_softmax(0)[each.label]) for each in positions]) / len(positions)


def best_temperature(positions: list[Position], low: float = 0.5, high: float = 4.0) -> float:
    """By ternary search."""
    low, high = 1 / high, 1 / low
    for _ in range(100):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        if nll(positions, 1 / first) < nll(positions, 1 / second):
            high = second
        else:
            low = first
    return 2 / (low + high)


def all_measures(positions: list[Position]) -> dict[str, float]:
    n = len(positions)
    mean_nll = nll(positions)
    return {
        "nll": mean_nll,
        "perplexity": math.exp(mean_nll),
        "kl": _sum([float(dense.position_loss(each, "forward_kl", "tail_bucket")) for each in positions]) / n,
        "reverse_kl": _sum([float(dense.position_loss(each, "reverse_kl", "tail_bucket")) for each in positions]) / n,
        "top1_agreement": sum(likeliest(each) in teachers(each, 1) for each in positions) / n,
        "top5_agreement": sum(likeliest(each) in teachers(each, 5) for each in positions) / n,
        "acceptance": _sum(
            [min(math.exp(p), math.exp(float(each.log_q[token]))) for each in positions for token, p in each.entries]
        )
        / n,
        "student_entropy": float(torch.stack([-(each.log_q.exp() * each.log_q).sum() for each in positions]).sum()) / n,
        "ece": calibration_error(positions),
        "temperature": best_temperature(positions),
    }
