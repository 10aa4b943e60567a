"""Do tokens and teacher speak of the same positions? Shifts of the label by −1, 0, +1, scored against the cache.

Two scores. Agreement: how often the label's own log-probability is that of its entry (or below all entries, where it
has none); it needs no good teacher. Likelihood: the teacher's log-probability of the label; it also finds a cache
whose label log-probabilities were made from shifted labels. It counts where the teacher knows the shifted labels: one
of random weights and a tied head finds its own input likelier than the next token, by up to 1.8 nats.
"""

from collections.abc import Iterable

import numpy as np

from data.cache.record import UNUSED, Array, Record
from kd_core.errors import UsageError

SHIFTS: tuple[int, ...] = (-1, 0, 1)
TOLERANCE = 0.05  # nats between a label's log-probability and its entry's: any codec is closer
MOST_DISAGREE, MOST_DISAGREE_SHARE = 2, 0.01  # positions of a small sample; share of a large one
ELSEWHERE = -5.0  # nats from the tail's mass to that of a token in it
LIKELIER = 1.0  # nats a position by which another shift must explain the labels better,
ERRORS = 4.0  # by so many standard errors of that difference,
KNOWN = 0.4  # and in less than this share of the nats that a uniform choice of ids would take


def label_scores(record: Record, shift: int, at: Array) -> tuple[Array, Array]:
    """Checks which labels `shift` positions on agree with their log-probability, and returns their likelihood too.

    Without an entry it is given a small part of the tail: the whole would favour labels of anywhere where few entries
    are kept. It is below all entries then. Samples count as entries for the likelihood alone, for a weight is no
    log-probability to agree with.
    """
    labels, own = record.token_ids[1:][at + shift], record.label_log_prob[at]
    inside, found = _entry(record.topk_token_ids[at], record.topk_log_probs[at], labels)
    entries = record.topk_log_probs[at]
    lowest = np.where(entries > UNUSED, entries, 0.0).min(axis=1, initial=0.0)
    agrees = np.where(found, np.abs(inside - own) <= TOLERANCE, own <= lowest + TOLERANCE)
    drawn, weight = np.zeros(len(at), bool), inside
    samples, weights = record.samples()
    if samples.shape[1]:
        weight, drawn = _entry(samples[at], weights[at], labels)
    elsewhere = np.where(drawn, weight, np.minimum(record.tail_log_prob[at] + ELSEWHERE, lowest))
    return agrees, np.maximum(np.where(found, inside, elsewhere), -100.0)


def _entry(ids: Array, logs: Array, labels: Array) -> tuple[Array, Array]:
    """The label's own among ids [T, K], and whether it is there."""
    values = np.where(ids == labels[:, None], logs, UNUSED).max(axis=1, initial=UNUSED)
    return values, values > UNUSED


def _explains_better(other: Array, own: Array, most: int) -> bool:
    """Checks whether labels of another shift are likelier, clearly and not by chance, to a teacher that knows them."""
    gain, n = other - own, len(own)
    if n < 2 or gain.mean() < LIKELIER or -other.mean() > KNOWN * np.log(most):
        return False
    return bool(gain.mean() > ERRORS * gain.std(ddof=1) / np.sqrt(n))


def check_alignment(records: Iterable[Record], where: str) -> None:
    """Refuse records whose labels are one position off.

    Raises:
        UsageError: shift 0 does not explain the labels, or another one does better.
    """
    agrees: dict[int, list[Array]] = {shift: [np.zeros(0)] for shift in SHIFTS}
    likelihood: dict[int, list[Array]] = {shift: [np.zeros(0)] for shift in SHIFTS}
    disagree, positions, most = 0, 0, 2
    for record in records:
        disagree += int((~label_scores(record, 0, np.arange(record.positions))[0]).sum())
        positions += record.positions
        most = max(most, int(record.token_ids.max()), int(record.topk_token_ids.max(initial=0)))
        for shift in SHIFTS:  # at the positions that have a label at every shift
            scores = label_scores(record, shift, np.arange(1, record.positions - 1))
            agrees[shift].append(scores[0])
            likelihood[shift].append(scores[1])
    found = {shift: np.concatenate(likelihood[shift]) for shift in SHIFTS}
    better = any(_explains_better(found[shift], found[0], most) for shift in SHIFTS if shift)
    if better or disagree > max(MOST_DISAGREE, MOST_DISAGREE_SHARE * positions):
        n = max(1, len(found[0]))
        shown = "; ".join(
            f"shift {s:+d}: agreement {np.concatenate(agrees[s]).sum() / n:.3f}, {found[s].sum() / n:.3f} nats"
            for s in SHIFTS
        )  # fmt: skip
        raise UsageError(
            f"{where}: labels are shifted against the teacher, or do not belong to it. {shown}. Wanted shift 0 to "
            f"agree in {1 - MOST_DISAGREE_SHARE} of positions and to be the likeliest. Export the cache again, or "
            "correct what converted it."
        )
