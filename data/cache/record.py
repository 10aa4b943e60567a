"""A record: scored positions of one document with what the teacher said at each, and how it is cut to less.

T positions. The head: at most K entries a position, likeliest of the teacher, in no particular order, and the mass
of all other tokens as one number, the tail. The samples: S draws out of the tail (K = 0: out of everything), each a
token with its importance weight, so that Σ w f(id) is an unbiased estimate of Σ p f over the tail.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
UNUSED = -np.inf
MOST_PADDING = 0.01  # of a position's mass: no column that a tokenizer never gives has learnt to take more


@dataclass(frozen=True)
class Record:
    """One window of a document. Log-probabilities are true ones, in nats; an entry of −inf is not used.

    Shapes: `token_ids` [T + 1] (inputs are [:-1], labels [1:]), `topk_*` [T, K], `sampled_*` [T, S], the others [T].
    `tempered_tails` has, for further temperatures τ, log Σ p^(1/τ) over the tokens outside the head.
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
        """T."""
        return len(self.loss_mask)

    def arrays(self) -> dict[str, Array]:
        """All arrays by name, for comparison."""
        flat = {f.name: getattr(self, f.name) for f in fields(self)}
        tails = {f"tail at {t}": tail for t, tail in flat.pop("tempered_tails").items()}
        return {name: value for name, value in {**flat, **tails}.items() if isinstance(value, np.ndarray)}

    def samples(self) -> tuple[Array, Array]:
        """Ids and log importance weights of the samples; [T, 0] where there are none."""
        if self.sampled_token_ids is None or self.sampled_log_weights is None:
            return np.zeros((self.positions, 0), np.int32), np.zeros((self.positions, 0), np.float32)
        return self.sampled_token_ids, self.sampled_log_weights

    def without_samples(self) -> Self:
        """The head alone."""
        return replace(self, sampled_token_ids=None, sampled_log_weights=None)

    def within(self, vocab_size: int) -> Self:
        """The record given that the next token is one of the first `vocab_size`: the others are padding columns.

        Entries of padding become unused, and the rest is divided by the mass that they leave. The other samples take
        the weight of those that fell on padding. Padding mass inside the tail is not known, and stays there.

        Raises:
            ValueError: a token is beyond the vocabulary, or more mass than padding has, or all samples of a position.
        """
        if (largest := int(self.token_ids.max(initial=0))) >= vocab_size:
            raise ValueError(f"token {largest} where there are {vocab_size}")
        samples, weights = self.samples()
        beyond, drawn_beyond = self.topk_token_ids >= vocab_size, samples >= vocab_size
        if not (beyond.any() or drawn_beyond.any()):
            return self
        padding = _mass(np.where(beyond, self.topk_log_probs, UNUSED))  # [T]
        kept_weights = np.where(drawn_beyond, UNUSED, weights)
        drawn, kept = _mass(weights), _mass(kept_weights)  # [T]
        if (most := padding.max(initial=0.0)) > MOST_PADDING:
            raise ValueError(f"ids from {vocab_size} on have a probability of {most:.3f} at a position")
        if (drawn > 0)[kept == 0].any():
            raise ValueError(f"all samples of a position are ids from {vocab_size} on")
        left = np.log1p(-padding)
        share = np.log(np.divide(kept, drawn, where=drawn > 0, out=np.ones_like(drawn)))
        has_samples = self.sampled_token_ids is not None
        return replace(
            self,
            topk_token_ids=np.where(beyond, 0, self.topk_token_ids),
            topk_log_probs=(np.where(beyond, UNUSED, self.topk_log_probs) - left[:, None]).astype(np.float32),
            tail_log_prob=(self.tail_log_prob - left).astype(np.float32),
            label_log_prob=(self.label_log_prob - left).astype(np.float32),
            tempered_tails={t: (tail - left / t).astype(np.float32) for t, tail in self.tempered_tails.items()},
            sampled_token_ids=np.where(drawn_beyond, 0, samples) if has_samples else None,
            sampled_log_weights=(kept_weights - (left + share)[:, None]).astype(np.float32) if has_samples else None,
        )

    def cut(self, top_k: int | None = None, min_prob: float = 0.0, mass: float = 1.0) -> Self:
        """The record as a narrower selection would have written it: what is cut off goes to the tail.

        Args:
            top_k: at most so many entries a position (None: all that are there).
            min_prob: only entries of at least this probability.
            mass: entries from the likeliest on until they hold this mass, the one that reaches it included.
        """
        K = self.topk_token_ids.shape[1]
        if (top_k is None or top_k >= K) and min_prob <= 0 and mass >= 1:
            return self
        # Entries of equal probability (a codec makes such) are ranked by id, so that the choice is one of content.
        by_id = np.argsort(self.topk_token_ids, axis=1, kind="stable")
        ids, logs = (np.take_along_axis(x, by_id, 1) for x in (self.topk_token_ids, self.topk_log_probs))
        order = np.argsort(-logs, axis=1, kind="stable")
        ids, logs = (np.take_along_axis(x, order, 1) for x in (ids, logs))
        kept = chosen(logs, K if top_k is None else top_k, min_prob, mass)
        width = int(kept.sum(axis=1).max(initial=0))  # what is kept comes first in each row
        lost = np.where(kept, UNUSED, logs).astype(np.float64)
        return replace(
            self,
            topk_token_ids=np.ascontiguousarray(np.where(kept, ids, ids[:, :1])[:, :width]),
            topk_log_probs=np.ascontiguousarray(np.where(kept, logs, UNUSED)[:, :width]),
            tail_log_prob=_with(self.tail_log_prob, lost).astype(np.float32),
            tempered_tails={
                t: _with(tail, np.where(lost > UNUSED, lost / t, UNUSED)).astype(np.float32)
                for t, tail in self.tempered_tails.items()
            },
        )


def chosen(sorted_log_probs: Array, top_k: int, min_prob: float, mass: float) -> Array:
    """Which entries of rows in falling order a selection keeps: [T, K] of bool, a prefix of each row."""
    probs = np.exp(sorted_log_probs.astype(np.float64))
    before = np.cumsum(probs, axis=1) - probs
    kept = (np.arange(probs.shape[1]) < top_k) & (sorted_log_probs > UNUSED)
    kept &= sorted_log_probs >= (np.log(min_prob) if min_prob > 0 else UNUSED)
    return kept & (before < mass)


def _mass(logs: Array) -> Array:
    """Σ e^x of each row, in float64."""
    return np.exp(logs.astype(np.float64)).sum(axis=1)


def _with(tail: Array, lost: Array) -> Array:
    """log of the tail's mass and that of the lost entries."""
    highest = np.maximum(lost.max(axis=1, initial=UNUSED), tail)
    finite = np.where(highest > UNUSED, highest, 0.0)
    total = np.exp(lost - finite[:, None]).sum(axis=1) + np.exp(tail - finite)
    with np.errstate(divide="ignore"):
        return finite + np.log(total)
