"""Do tokens and teacher speak of the same positions? Shifts of the label by −1, 0, +1, scored against the cache."""

from collections.abc import Iterable

import numpy as np

from data.cache.schema import Record
from kd_core.errors import UsageError

SHIFTS: tuple[int, ...] = (-1, 0, 1)
LABEL_TOLERANCE = 0.05


def label_scores(record: Record) -> dict[int, tuple[float, int]]:
    """For each shift: the teacher's summed log-probability of the label that many positions on, and the count.

    A label outside the entries counts with the whole tail, its upper bound.
    """
    labels, scores = record.token_ids[1:], {}
    for shift in SHIFTS:
        at = np.arange(max(0, -shift), record.positions - max(0, shift))
        found = record.topk_token_ids[at] == labels[at + shift][:, None]
        inside = np.where(found, record.topk_log_probs[at], -np.inf).max(axis=1, initial=-np.inf)
        values = np.where(found.any(axis=1), inside, record.tail_log_prob[at])
        scores[shift] = (float(np.maximum(values, -100.0).sum()), len(at))
    return scores


def label_error(record: Record) -> float:
    """Largest difference between a label's own log-probability and its entry's, in nats, where it has an entry."""
    found = record.topk_token_ids == record.token_ids[1:, None]
    errors = np.where(found, np.abs(record.topk_log_probs - record.label_log_prob[:, None]), 0.0)
    return float(errors.max(initial=0.0))


def check_alignment(records: Iterable[Record], where: str) -> None:
    """Refuse records whose labels are one position off.

    Raises:
        UsageError: another shift than 0 explains the labels best, or labels contradict their own entries.
    """
    totals = dict.fromkeys(SHIFTS, 0.0)
    counts = dict.fromkeys(SHIFTS, 0)
    error = 0.0
    for record in records:
        for shift, (score, count) in label_scores(record).items():
            totals[shift] += score
            counts[shift] += count
        error = max(error, label_error(record))
    means = {shift: totals[shift] / max(1, counts[shift]) for shift in SHIFTS}
    shown = ", ".join(f"{shift:+d}: {mean:.3f}" for shift, mean in means.items())
    if max(SHIFTS, key=lambda shift: means[shift]) != 0:
        raise UsageError(
            f"{where}: labels are shifted against the teacher. Mean log-probability of the label by shift: {shown}; "
            "wanted shift 0 to be the best. Export the cache again, or correct what converted it."
        )
    if error > LABEL_TOLERANCE:
        raise UsageError(
            f"{where}: a label's log-probability differs by {error:.3f} nats from its own entry (by shift: {shown}); "
            f"wanted at most {LABEL_TOLERANCE}. Tokens and teacher entries do not belong together."
        )
