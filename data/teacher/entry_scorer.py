"""Scorers that give a teacher's likeliest entries in place of its logits, and what a selection makes of them."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.cache.selection import Selection
from data.teacher.select import UNUSED, TeacherScores, is_within_limits

# Float32 log-probabilities do not resolve a smaller tail: each is rounded to some 6e-8, and so is the log Z they share.
SMALLEST_TAIL = 1e-6


@runtime_checkable
class EntryScorer(Protocol):
    """Anything that returns the likeliest tokens of a position. It serves `top_k`, `min_prob` and `mass` alone.

    Several threads call it at once.
    """

    @property
    def device(self) -> torch.device:
        """Returns the device that `tokens` must be on."""
        ...

    def scores(
        self, tokens: Int[Tensor, "B S"], document_ids: Int[Tensor, "B T"], selection: Selection
    ) -> TeacherScores:
        """Scores positions 0 … T−1 of rows of S = T + 1 tokens, flattened to N = B·T.

        A row is one document, padded on its right (document −1).
        """
        ...


def select_from_entries(
    ids: Int[Tensor, "n K"],
    log_probs: Float[Tensor, "n K"],
    label_log_probs: Float[Tensor, " n"],
    selection: Selection,
    vocab_size: int,
) -> TeacherScores:
    """Computes the scores of n positions from float64 log-probabilities of their K likeliest tokens, in any order.

    Ids from `vocab_size` on are padding columns of an lm_head. Their entries become unused, and the rest is divided by
    the mass that they leave.

    The tail is 1 − Σp, no smaller than `SMALLEST_TAIL` and no larger than the least likely entry allows. Its mass is as
    exact as the engine's log Z (docs/vllm.md), and its logarithm only where the tail is much larger than that error.
    """
    # Condition on the real vocabulary, and sort the entries to fall.  [n, K]
    padding = torch.where(ids < vocab_size, UNUSED, log_probs).exp().sum(dim=1)
    normaliser = torch.log1p(-padding)
    log_probs = torch.where(ids < vocab_size, log_probs - normaliser[:, None], UNUSED)
    log_probs, order = log_probs.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order).masked_fill_(log_probs == UNUSED, 0)
    # All tokens outside the k used entries are at most as likely as the last of them: tail ≤ (V − k) · p_k.  [n]
    used = log_probs > UNUSED
    least = torch.where(used, log_probs, torch.inf).amin(dim=1).exp()
    largest_tail = least * (vocab_size - used.sum(dim=1)).clamp(min=0)
    tail = (1 - log_probs.exp().sum(dim=1)).clamp(min=SMALLEST_TAIL).minimum(largest_tail)
    if not selection.fixed:
        # Entries outside the limits go back to the tail.
        within = is_within_limits(log_probs, selection)
        tail = tail + torch.where(within, UNUSED, log_probs).exp().sum(dim=1)
        log_probs = torch.where(within, log_probs, UNUSED)
    n = len(ids)
    return TeacherScores(
        ids,
        log_probs.float(),
        tail.log().float(),
        (label_log_probs - normaliser).float(),
        log_probs.new_empty(n, 0, dtype=torch.float32),
        ids.new_empty(n, 0),
        log_probs.new_empty(n, 0, dtype=torch.float32),
    )
