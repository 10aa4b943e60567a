"""Cache records: the scored positions of one window of a document, with the teacher's entries at each.

A record has T positions. At each one are stored

    entries   at most K of the teacher's likeliest tokens with their log-probabilities, in no particular order
    tail      the log of the mass of all other tokens
    samples   S draws out of the tail (K = 0: out of everything), each a token with its importance weight w,
              so that Σ w f(id) is an unbiased estimate of Σ p f over the tail

A record can be cut to fewer entries, as a narrower selection would have written it.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
UNUSED = -np.inf
MOST_PADDING = 0.01  # of a position's mass; columns of ids that the tokenizer never gives have learnt to take less


@dataclass(frozen=True)
class Record:
    """One window of a document, from token `start` on.

    Log-probabilities are true ones (over the whole vocabulary), in nats. An entry of −inf is not used.
    Shapes: `token_ids` [T + 1] (inputs are [:-1], labels [1:]), `topk_*` [T, K], `sampled_*` [T, S], all others [T].
    `tempered_tails` has, for further temperatures τ, log Σ p^(1/τ) over all tokens but the entries.
    """

    name: str
    document: str
    start: int
    token_ids: Array
    loss_mask: Array
    topk_token_ids: Array
    topk_log_probs: Array
    tail_log_prob: Array
    label_log_prob: Array
    tempered_tails: dict[float, Array] = field(default_factory=dict)
    sampled_token_ids: Array | None = None
    sampled_log_weights: Array | None = None

    @property
    def positions(self) -> int:
        """Returns T, the number of positions."""
        return len(self.loss_mask)

    def arrays(self) -> dict[str, Array]:
        """Returns all arrays by name, for comparison."""
        flat = {f.name: getattr(self, f.name) for f in fields(self)}
        tails = {f"tail at {t}": tail for t, tail in flat.pop("tempered_tails").items()}
        return {name: value for name, value in {**flat, **tails}.items() if isinstance(value, np.ndarray)}

    def detached(self) -> Self:
        """Returns the record with arrays of its own, so that the block that it was cut from can be freed."""
        own = {f.name: value.copy() for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)}
        return replace(self, **own, tempered_tails={t: tail.copy() for t, tail in self.tempered_tails.items()})

    def samples(self) -> tuple[Array, Array]:
        """Returns the ids and the log importance weights of the samples, [T, S], or [T, 0] where there are none."""
        if self.sampled_token_ids is None or self.sampled_log_weights is None:
            return np.zeros((self.positions, 0), np.int32), np.zeros((self.positions, 0), np.float32)
        return self.sampled_token_ids, self.sampled_log_weights

    def without_samples(self) -> Self:
        """Returns the record without its samples."""
        return replace(self, sampled_token_ids=None, sampled_log_weights=None)

    def within(self, vocab_size: int) -> Self:
        """Returns the record conditioned on the first `vocab_size` ids. All ids beyond are padding columns.

        Entries of padding become unused, and the rest is divided by the mass that they leave. The other samples take
        the weight of those that fell on padding. The padding mass inside the tail is unknown, and stays there.

        Raises:
            ValueError: a token is beyond the vocabulary, ids beyond it have more mass than padding can have, or all
                samples of a position are beyond it.
        """
        if (largest := int(self.token_ids.max(initial=0))) >= vocab_size:
            raise ValueError(f"token {largest} where there are {vocab_size}")
        samples, weights = self.samples()
        beyond, drawn_beyond = self.topk_token_ids >= vocab_size, samples >= vocab_size
        if not (beyond.any() or drawn_beyond.any()):
            return self
        # Mass of padding among the entries, and of the samples with and without padding.  [T] each
        padding = _mass(np.where(beyond, self.topk_log_probs, UNUSED))
        real_weights = np.where(drawn_beyond, UNUSED, weights)
        drawn, drawn_real = _mass(weights), _mass(real_weights)
        if (most := padding.max(initial=0.0)) > MOST_PADDING:
            raise ValueError(f"ids from {vocab_size} on have a probability of {most:.3f} at a position")
        if (drawn > 0)[drawn_real == 0].any():
            raise ValueError(f"all samples of a position are ids from {vocab_size} on")
        # log of the remaining mass: log p(id | real) = log p(id) − log(1 − padding). At temperature τ the tail is
        # log Σ p^(1/τ), so it loses log(1 − padding) / τ.  [T]
        left = np.log1p(-padding)
        # log of the real share of the sample weight: dividing by it gives the lost weight to the other samples.  [T]
        share = np.log(np.divide(drawn_real, drawn, where=drawn > 0, out=np.ones_like(drawn)))
        has_samples = self.sampled_token_ids is not None
        return replace(
            self,
            topk_token_ids=np.where(beyond, 0, self.topk_token_ids),
            topk_log_probs=(np.where(beyond, UNUSED, self.topk_log_probs) - left[:, None]).astype(np.float32),
            tail_log_prob=(self.tail_log_prob - left).astype(np.float32),
            label_log_prob=(self.label_log_prob - left).astype(np.float32),
            tempered_tails={t: (tail - left / t).astype(np.float32) for t, tail in self.tempered_tails.items()},
            sampled_token_ids=np.where(drawn_beyond, 0, samples) if has_samples else None,
            sampled_log_weights=(real_weights - (left + share)[:, None]).astype(np.float32) if has_samples else None,
        )

    def cut(self, top_k: int | None = None, min_prob: float = 0.0, mass: float = 1.0) -> Self:
        """Returns the record as a narrower selection would have written it. Entries that are cut go to the tail.

        Args:
            top_k: at most so many entries a position (None: all that are stored).
            min_prob: only entries of at least this probability.
            mass: entries from the likeliest on until they hold this mass, the one that reaches it included.
        """
        K = self.topk_token_ids.shape[1]
        if (top_k is None or top_k >= K) and min_prob <= 0 and mass >= 1:
            return self
        # Sort by falling log-probability, and equal ones (a codec makes such) by rising id: two stable sorts. The
        # choice then depends on the entries alone, not on their order in the record.  [T, K]
        by_id = np.argsort(self.topk_token_ids, axis=1, kind="stable")
        ids, logs = (np.take_along_axis(x, by_id, 1) for x in (self.topk_token_ids, self.topk_log_probs))
        order = np.argsort(-logs, axis=1, kind="stable")
        ids, logs = (np.take_along_axis(x, order, 1) for x in (ids, logs))
        # The selected entries are a prefix of each row, so the rows can be cut to the longest one.
        is_selected = selected_entries(logs, K if top_k is None else top_k, min_prob, mass)
        width = int(is_selected.sum(axis=1).max(initial=0))
        # The tail becomes log(e^tail + Σ e^lost); at temperature τ, log(e^tail + Σ e^(lost / τ)).  [T]
        lost = np.where(is_selected, UNUSED, logs).astype(np.float64)
        return replace(
            self,
            topk_token_ids=np.ascontiguousarray(np.where(is_selected, ids, ids[:, :1])[:, :width]),
            topk_log_probs=np.ascontiguousarray(np.where(is_selected, logs, UNUSED)[:, :width]),
            tail_log_prob=_add_to_tail(self.tail_log_prob, lost).astype(np.float32),
            tempered_tails={
                t: _add_to_tail(tail, np.where(lost > UNUSED, lost / t, UNUSED)).astype(np.float32)
                for t, tail in self.tempered_tails.items()
            },
        )


def selected_entries(sorted_log_probs: Array, top_k: int, min_prob: float, mass: float) -> Array:
    """Returns which entries a selection keeps, as bool [T, K]: a prefix of each row.

    Each row of `sorted_log_probs` [T, K] falls.
    """
    probs = np.exp(sorted_log_probs.astype(np.float64))
    # Mass of the entries before each one: the entry that reaches `mass` has less than it before, so it is kept.  [T, K]
    before = np.cumsum(probs, axis=1) - probs
    is_selected = (np.arange(probs.shape[1]) < top_k) & (sorted_log_probs > UNUSED)
    is_selected &= sorted_log_probs >= (np.log(min_prob) if min_prob > 0 else UNUSED)
    return is_selected & (before < mass)


def _mass(logs: Array) -> Array:
    """Returns Σ e^x of each row, in float64.  [T, K] → [T]"""
    return np.exp(logs.astype(np.float64)).sum(axis=1)


def _add_to_tail(tail: Array, lost: Array) -> Array:
    """Returns log(e^tail + Σ e^lost), the log-mass of the tail with the lost entries.  [T], [T, K] → [T]"""
    # Subtract the highest term before exp. A row that is −inf throughout stays −inf.
    highest = np.maximum(lost.max(axis=1, initial=UNUSED), tail)
    finite = np.where(highest > UNUSED, highest, 0.0)
    total = np.exp(lost - finite[:, None]).sum(axis=1) + np.exp(tail - finite)
    with np.errstate(divide="ignore"):
        return finite + np.log(total)
