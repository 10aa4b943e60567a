"""Calibration of a student: sums over scored positions, and the two metrics that are computed from them.

    expected calibration error     Σ over 15 bins of confidence, |Σ (right − confidence)| / positions
    temperature                    the τ that minimises the NLL of softmax(logits / τ)

Both are as in Guo et al., arXiv 1706.04599. "Right" is 1 where the student's likeliest token is the label, else 0.
The confidence is the probability of that token.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import Polynomial
from torch import Tensor

BINS = 15
GAP_NAMES = tuple(f"calibration_gap_{i}" for i in range(BINS))
# The NLL is summed at 15 temperatures τ from 4 to ½, given by 1/τ in eighths. So the power s^(1/τ) of a softmax s is
# the one before times the eighth root of s.
EIGHTHS = tuple(range(2, 17))
TEMPERATURE_NLL_NAMES = tuple(f"nll_at_{eighths}_eighths" for eighths in EIGHTHS)
# Rows of the softmax whose eighth roots are held at a time.
BLOCK_ROWS = 32


def gap_sums(log_confidence: Float[Tensor, " n"], right: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Returns the sum of right − confidence in each bin of confidence: (0, 1/15], (1/15, 2/15], …"""
    # Bin of each position, 0 to 14.  [n]
    confidence = log_confidence.exp()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    # Positions that are not scored add 0 to their bin.  [n] → [15]
    position_gaps = torch.where(mask, right.to(confidence.dtype) - confidence, 0.0)
    return dict(zip(GAP_NAMES, position_gaps.new_zeros(BINS).scatter_add_(0, bins, position_gaps), strict=True))


def power_sums(softmax: Float[Tensor, "n V"]) -> Float[Tensor, "n powers"]:
    """Returns Σ s^(e/8) over the vocabulary for each e of `EIGHTHS`. A probability of 0 adds 0."""
    block_sums: list[Tensor] = []
    for rows in softmax.split(BLOCK_ROWS):
        # s^(1/8), and s^(2/8), the first power.  [block, V]
        root = rows.sqrt().sqrt_().sqrt_()
        power, sums = root.square(), []
        for eighths in EIGHTHS:
            # s^(e/8) = s^((e − 1)/8) · s^(1/8).
            if eighths > EIGHTHS[0]:
                power.mul_(root)
            sums.append(power.sum(dim=1))
        # Per row, one sum per exponent.  [block, powers]
        block_sums.append(torch.stack(sums, dim=1))
    return torch.cat(block_sums)


def nll_at_temperatures(
    log_q: Float[Tensor, "n E"], tail: Float[Tensor, "n powers"], label: Float[Tensor, " n"], mask: Tensor
) -> dict[str, Tensor]:
    """Returns sums of −log softmax(logits / τ) at the label, by temperature.

    Args:
        log_q: log q of the distinct entries at τ = 1; −inf where an entry repeats another or does not exist.
        tail: log Σ q^(1/τ) over all other tokens, for each τ.
        label: log q of the label.
        mask: the scored positions.
    """
    sums: dict[str, Tensor] = {}
    for i, (name, eighths) in enumerate(zip(TEMPERATURE_NLL_NAMES, EIGHTHS, strict=True)):
        inverse = eighths / 8
        # softmax(logits / τ) ∝ q^(1/τ): its normaliser is Σ q^(1/τ) over the entries and the tail.  [n]
        normaliser = torch.logaddexp((inverse * log_q).logsumexp(dim=1), tail[:, i])
        sums[name] = torch.where(mask, normaliser - inverse * label, 0.0).sum()
    return sums


def calibration_error(sums: Mapping[str, float], positions: float) -> float:
    """Returns the expected calibration error, in probability, 0 to 1."""
    return sum(abs(sums[name]) for name in GAP_NAMES) / max(1.0, positions)


def best_temperature(sums: Mapping[str, float]) -> float:
    """Returns the τ between ½ and 4 at which the NLL is least, or NaN where the sums are not finite.

    The NLL is convex in 1/τ, so it has one minimum. It is found on the quartic in log τ through five of the sums.
    """
    values, logs = np.array([sums[name] for name in TEMPERATURE_NLL_NAMES]), np.log(8 / np.array(EIGHTHS))
    if not np.isfinite(values).all():
        return math.nan
    # The five temperatures around the least sum, shifted inwards at both ends.
    least = int(values.argmin())
    start = min(max(0, least - 2), len(values) - 5)
    window = slice(start, start + 5)
    # Fit differences to the least sum: sums of many positions are large numbers that are nearly equal.
    fitted = Polynomial.fit(logs[window], values[window] - values[least], 4)
    # Stationary points of the quartic between the two neighbours of the least sum. `logs` falls, since 1/τ rises.
    bounds = (logs[min(least + 1, len(values) - 1)], logs[max(0, least - 1)])
    stationary = [
        float(root.real) for root in fitted.deriv().roots() if root.imag == 0 and bounds[0] < root.real < bounds[1]
    ]
    return math.exp(min([float(logs[least]), *stationary], key=fitted))
