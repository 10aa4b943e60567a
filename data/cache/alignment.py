"""Check that labels and teacher entries belong to the same positions, by scoring labels shifted by −1, 0 and +1.

There are two scores:

    agreement    the share of labels whose log-probability is that of their entry, or below all entries where the
                 label is none of them
    likelihood   the teacher's log-probability of the label

Agreement does not need a good teacher. Likelihood also finds a cache whose label log-probabilities were computed from
shifted labels. It counts only where the teacher predicts the shifted labels well: a teacher of random weights whose
lm_head is tied to the embedding finds its own input likelier than the next token, by up to 1.8 nats.
"""

from collections.abc import Iterable

import numpy as np

from data.cache.record import UNUSED, Array, Record
from kd_core.errors import UsageError

SHIFTS: tuple[int, ...] = (-1, 0, 1)
TOLERANCE = 0.05  # nats between a label's log-probability and its entry's; the codecs stay below
# Levels are equal steps of √p, so the least likely entry may be read half a step below what it was, and levels of
# unlikely entries are 0.58 nats apart.
HALF_STEP, MOST_HALF_STEP = 0.0028, 0.3
MOST_DISAGREE, MOST_DISAGREE_SHARE = 2, 0.01  # positions of a small sample; share of a large one
ELSEWHERE = -5.0  # nats from the tail's mass to that of a token in it
# Another shift is better if all three hold for its likelihood:
LEAST_GAIN = 1.0  # nats a position above that of shift 0
LEAST_ERRORS = 4.0  # gain in standard errors of its mean
MOST_LOSS_SHARE = 0.4  # its loss, as a share of the log(V) nats of a uniform choice of ids


def label_scores(record: Record, shift: int, positions: Array) -> tuple[Array, Array]:
    """Scores the labels `shift` positions further on: whether they agree, and their log-likelihood.  [n] each

    A label that is not an entry counts as e^−5 of the tail, and as no likelier than any entry. All of the tail would
    favour labels of any other position where few entries are kept.
    Samples count as entries for the likelihood alone, because a weight is no log-probability to agree with.
    """
    labels, label_logs = record.token_ids[1:][positions + shift], record.label_log_prob[positions]
    # log p of the entry that is the label.  [n, K] → [n]
    entry_logs, has_entry = _entry(record.topk_token_ids[positions], record.topk_log_probs[positions], labels)
    # The least likely used entry of each position, or 0 where there is none.  [n]
    entries = record.topk_log_probs[positions]
    lowest = np.where(entries > UNUSED, entries, 0.0).min(axis=1, initial=0.0)
    # The label's log-probability equals its entry's; without an entry, it is at most that of the least likely one.  [n]
    half_steps = np.minimum(2 * np.log1p(HALF_STEP * np.exp(-np.maximum(lowest, -20) / 2)), MOST_HALF_STEP)
    most = lowest + half_steps + TOLERANCE
    distance = np.abs(np.where(has_entry, entry_logs, 0.0) - label_logs)
    agrees = np.where(has_entry, distance <= TOLERANCE, label_logs <= most)
    # log weight of the sample that is the label.  [n, S] → [n]
    is_drawn, sample_logs = np.zeros(len(positions), bool), entry_logs
    samples, weights = record.samples()
    if samples.shape[1]:
        sample_logs, is_drawn = _entry(samples[positions], weights[positions], labels)
    # Likelihood from the entry, else the sample, else min(tail − 5, lowest entry); at least −100 nats.  [n]
    elsewhere = np.where(is_drawn, sample_logs, np.minimum(record.tail_log_prob[positions] + ELSEWHERE, lowest))
    return agrees, np.maximum(np.where(has_entry, entry_logs, elsewhere), -100.0)


def _entry(ids: Array, logs: Array, labels: Array) -> tuple[Array, Array]:
    """Returns the log-probability of the entry that is the label, and whether there is one.  [n, K] → [n] each"""
    values = np.where(ids == labels[:, None], logs, UNUSED).max(axis=1, initial=UNUSED)
    return values, values > UNUSED


def _explains_better(shifted: Array, unshifted: Array, largest_id: int) -> bool:
    """Checks whether shifted labels are likelier than those of shift 0: clearly, not by chance, and likely at all.

    Both arguments are log-likelihoods [n]. The largest id stands for V in log(V).
    """
    gain, n = shifted - unshifted, len(unshifted)
    if n < 2 or gain.mean() < LEAST_GAIN or -shifted.mean() > MOST_LOSS_SHARE * np.log(largest_id):
        return False
    # Mean gain against its standard error, σ / √n.
    return bool(gain.mean() > LEAST_ERRORS * gain.std(ddof=1) / np.sqrt(n))


def check_alignment(records: Iterable[Record], where: str) -> None:
    """Checks that the labels of records are not one position off.

    Raises:
        UsageError: too many labels of shift 0 disagree, or another shift explains the labels better.
    """
    agrees: dict[int, list[Array]] = {shift: [np.zeros(0)] for shift in SHIFTS}
    likelihood: dict[int, list[Array]] = {shift: [np.zeros(0)] for shift in SHIFTS}
    disagree, positions, largest_id = 0, 0, 2
    for record in records:
        # Agreement of shift 0 at all positions.
        disagree += int((~label_scores(record, 0, np.arange(record.positions))[0]).sum())
        positions += record.positions
        largest_id = max(largest_id, int(record.token_ids.max()), int(record.topk_token_ids.max(initial=0)))
        # Compare the shifts at the same positions: those that have a label at every shift.
        for shift in SHIFTS:
            scores = label_scores(record, shift, np.arange(1, record.positions - 1))
            agrees[shift].append(scores[0])
            likelihood[shift].append(scores[1])
    log_probs = {shift: np.concatenate(likelihood[shift]) for shift in SHIFTS}
    is_shifted = any(_explains_better(log_probs[shift], log_probs[0], largest_id) for shift in SHIFTS if shift)
    if is_shifted or disagree > max(MOST_DISAGREE, MOST_DISAGREE_SHARE * positions):
        n = max(1, len(log_probs[0]))
        shown = "; ".join(
            f"shift {s:+d}: agreement {np.concatenate(agrees[s]).sum() / n:.3f}, {log_probs[s].sum() / n:.3f} nats"
            for s in SHIFTS
        )  # fmt: skip
        raise UsageError(
            f"{where}: labels are shifted against the teacher, or do not belong to it. {shown}. Wanted shift 0 to "
            f"agree in {1 - MOST_DISAGREE_SHARE} of positions and to be the likeliest. Export the cache again, or "
            "correct what converted it."
        )
