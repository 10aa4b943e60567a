"""Log-probabilities as levels, one byte each: equal steps of √p, which is where a fixed rate loses least KL.

An error of Δ√p in an entry costs 2 (Δ√p)² of KL whatever p is, so equal steps δ give δ²/6 an entry. Two ends differ.
Below 3δ equal steps would make a factor out of a rounding, so there the levels are a constant factor apart, down to
e^−30. Above √p = 0.45, where a position has four entries at the most, they are three times as wide, so that 256
levels are enough. Entries and tail are then scaled to sum to 1, on reading.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
FINE_FROM, COARSE_FROM, COARSE_BY = 3, 0.45, 3
LOWEST = -30.0
STEPS = {"standard": 0.0037, "compact": 0.0056}  # 64 entries: a KL of 1.4e-4 and 3.2e-4
CODECS = (*STEPS, "lossless")


@dataclass(frozen=True)
class Levels:
    """The levels of a step δ."""

    step: float

    @cached_property
    def log_probs(self) -> Array:
        """The log-probability of each level, rising: float32, at most 256."""
        fine = np.arange(FINE_FROM, COARSE_FROM / self.step) * self.step
        coarse = np.arange(fine[-1], 1.0, COARSE_BY * self.step)[1:]
        upper = 2 * np.log(np.concatenate([fine, coarse, [1.0]]))
        below = np.arange(upper[0], LOWEST, -(upper[1] - upper[0]))[:0:-1]
        levels = np.concatenate([below, upper]).astype(np.float32)
        assert len(levels) <= 256, f"a step of {self.step} makes {len(levels)} levels"
        return levels

    @cached_property
    def _borders(self) -> Array:
        """Between neighbouring levels: half way in √p."""
        roots = np.exp(self.log_probs.astype(np.float64) / 2)
        return 2 * np.log((roots[1:] + roots[:-1]) / 2)

    @cached_property
    def probs(self) -> Array:
        """The probability of each level, float32."""
        return np.exp(self.log_probs.astype(np.float64)).astype(np.float32)

    def to_levels(self, log_probs: Array) -> Array:
        """The nearest level of each, uint8."""
        return np.searchsorted(self._borders, log_probs).astype(np.uint8)
