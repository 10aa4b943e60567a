"""Means over seeds with the 95% confidence interval of Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
MOST = 1e100  # keeps sums of squares below the overflow of a float64


@dataclass(frozen=True)
class Mean:
    """A mean over `n` values. Its interval is mean ± half, and `half` is None where there are too few values."""

    mean: float
    half: float | None
    n: int


def _within(theta: float, freedom: int) -> float:
    """Returns P(|t| ≤ √freedom · tan theta) by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    # Odd: cos θ + 2/3 cos³ θ + (2·4)/(3·5) cos⁵ θ + …; even: 1 + 1/2 cos² θ + (1·3)/(2·4) cos⁴ θ + …
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine * cosine * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Returns the t with P(|T| ≤ t) = confidence, by bisection of its angle: t = √freedom · tan theta."""
    low, high = 0.0, math.pi / 2
    # 80 halvings of [0, π/2] reach the precision of a float64.
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def mean_of(values: Sequence[float]) -> Mean:
    """Returns the mean of the values with its interval.

    One value has no interval. Values that are not finite, or not below `MOST`, have a mean of NaN.
    """
    n = len(values)
    if not all(abs(value) < MOST for value in values):
        return Mean(math.nan, None, n)
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(mean, None, n)
    # Sample variance s² = Σ (x − mean)² / (n − 1), half-width t · s / √n.
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Mean(mean, t_quantile(n - 1) * math.sqrt(variance / n), n)
