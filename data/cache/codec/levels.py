"""Log-probabilities quantised to levels, one byte each, at equal steps of √p: the spacing that loses least KL.

An error of Δ√p in an entry costs 2 (Δ√p)² of KL whatever p is, so equal steps δ cost δ²/6 an entry. Two ranges differ:

    √p < 3δ     equal steps would round by whole factors: levels are a constant factor of p apart, down to e^−30
    √p > 0.45   a position has at most four such entries: steps are 3δ, so that 256 levels suffice

Readers then scale entries and tail to sum to 1.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
FINE_FROM, COARSE_FROM, COARSE_BY = 3, 0.45, 3
LOWEST = -30.0
STEPS = {"standard": 0.0037, "compact": 0.0056}  # 64 entries: a KL of 1.4e-4 and 3.2e-4
Codec = Literal["standard", "compact", "lossless"]


@dataclass(frozen=True)
class Levels:
    """The levels of step δ = `step`."""

    step: float

    @cached_property
    def log_probs(self) -> Array:
        """Returns the log-probability of each level, in rising order: float32, at most 256."""
        # Steps of δ from √p = 3δ up to 0.45, then steps of 3δ up to 1, as log p = 2 log √p.
        fine = np.arange(FINE_FROM, COARSE_FROM / self.step) * self.step
        coarse = np.arange(fine[-1], 1.0, COARSE_BY * self.step)[1:]
        upper = 2 * np.log(np.concatenate([fine, coarse, [1.0]]))
        # Below, steps of the first difference of logs, down to −30: p falls by a constant factor.
        below = np.arange(upper[0], LOWEST, -(upper[1] - upper[0]))[:0:-1]
        levels = np.concatenate([below, upper]).astype(np.float32)
        assert len(levels) <= 256, f"a step of {self.step} makes {len(levels)} levels"
        return levels

    @cached_property
    def _borders(self) -> Array:
        """Returns the log-probability at the midpoint in √p of each two neighbouring levels."""
        # √p = e^(log p / 2), midpoints of neighbours, and back to log p.  [levels] → [levels − 1]
        roots = np.exp(self.log_probs.astype(np.float64) / 2)
        return 2 * np.log((roots[1:] + roots[:-1]) / 2)

    @cached_property
    def probs(self) -> Array:
        """Returns the probability of each level, float32."""
        # Take exp in float64 and round once, so that a second reader gets the same bits.
        return np.exp(self.log_probs.astype(np.float64)).astype(np.float32)

    def to_levels(self, log_probs: Array) -> Array:
        """Returns the level nearest in √p to each log-probability, uint8."""
        return np.searchsorted(self._borders, log_probs).astype(np.uint8)
