"""Do tokens and teacher speak of the same positions? Shifts of the label by −1, 0, +1, scored against the cache.

Two scores. Agreement: how often the label's own log-probability is that of its entry (or below all entries, where it
has none); it needs no good teacher. Likelihood: the teacher's mean log-probability of the label; it also finds a
cache whose label log-probabilities were made from shifted labels.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data.cache.record import UNUSED, Array, Record
from kd_core.errors import UsageError

SHIFTS: tuple[int, ...] = (-1, 0, 1)
TOLERANCE = 0.05  # nats between a label's log-probability and its entry's: any codec is closer
WANTED_AGREEMENT = 0.99
ELSEWHERE = -5.0  # nats from the tail's mass to that of a token in it
CLEAR = 0.05  # of agreement above every other shift: then a teacher that knows nothing yet may find another likelier
LIKELIHOOD_MARGIN = 0.05  # nats by which chance may favour a wrong shift under a teacher that knows nothing


class ShiftScore(NamedTuple):
    """Sums over positions."""

    agreement: float
    likelihood: float
    positions: int


def label_scores(record: Record, shift: int) -> ShiftScore:
    """How well the label `shift` positions on fits head and samples.

    Without an entry it is given a small part of the tail: the whole would favour labels of anywhere where few entries
    are kept. Samples count as entries for the likelihood alone, for a weight is no log-probability to agree with.
    """
    at = np.arange(max(0, -shift), record.positions - max(0, shift))
    labels, own = record.token_ids[1:][at + shift], record.label_log_prob[at]
    inside, found = _entry(record.topk_token_ids[at], record.topk_log_probs[at], labels)
    entries = record.topk_log_probs[at]
    lowest = np.where(entries > UNUSED, entries, 0.0).min(axis=1, initial=0.0)
    agrees = np.where(found, np.abs(inside - own) <= TOLERANCE, own <= lowest + TOLERANCE)
    drawn, weight = np.zeros(len(at), bool), inside
    samples, weights = record.samples()
    if samples.shape[1]:
        weight, drawn = _entry(samples[at], weights[at], labels)
    elsewhere = np.where(drawn, weight, record.tail_log_prob[at] + ELSEWHERE)
    likelihood = np.where(found, inside, elsewhere)
    return ShiftScore(float(agrees.sum()), float(np.maximum(likelihood, -100.0).sum()), len(at))


def _entry(ids: Array, logs: Array, labels: Array) -> tuple[Array, Array]:
    """The label's own among ids [T, K], and whether it is there."""
    values = np.where(ids == labels[:, None], logs, UNUSED).max(axis=1, initial=UNUSED)
    return values, values > UNUSED


def check_alignment(records: Iterable[Record], where: str) -> None:
    """Refuse records whose labels are one position off.

    Raises:
        UsageError: shift 0 does not explain the labels, or another one does better.
    """
    agreement, likelihood, positions = (dict.fromkeys(SHIFTS, 0.0) for _ in range(3))
    for record in records:
        for shift in SHIFTS:
            score = label_scores(record, shift)
            agreement[shift] += score.agreement
            likelihood[shift] += score.likelihood
            positions[shift] += score.positions
    agreement = {shift: agreement[shift] / max(1, positions[shift]) for shift in SHIFTS}
    likelihood = {shift: likelihood[shift] / max(1, positions[shift]) for shift in SHIFTS}
    best = max(SHIFTS, key=lambda shift: likelihood[shift])
    likelier = best != 0 and positions[best] > 0 and likelihood[best] > likelihood[0] + LIKELIHOOD_MARGIN
    decided = agreement[0] >= max(agreement[shift] for shift in SHIFTS if shift) + CLEAR
    if agreement[0] < WANTED_AGREEMENT or (likelier and not decided):
        shown = "; ".join(f"shift {s:+d}: agreement {agreement[s]:.3f}, {likelihood[s]:.3f} nats" for s in SHIFTS)
        raise UsageError(
            f"{where}: labels are shifted against the teacher, or do not belong to it. {shown}. Wanted shift 0 to "
            f"agree in {WANTED_AGREEMENT} of positions and to be the likeliest. Export the cache again, or correct "
            "what converted it."
        )
