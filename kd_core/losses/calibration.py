"""Whether a student is as sure as it is right: sums over scored positions, and what they come to.

    expected calibration error     Σ over 15 bins of confidence, |Σ (right − confidence)| / positions
    temperature                    the τ that minimises the NLL of softmax(logits / τ)

both as in Guo et al., arXiv 1706.04599, for the student's likeliest token against the label.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import Polynomial
from torch import Tensor

BINS = 15
GAPS = tuple(f"calibration_gap_{i}" for i in range(BINS))
# 1/τ of the NLLs that are summed, τ from 4 to ½. In eighths: each softmax is the one before times the eighth root.
EIGHTHS = tuple(range(2, 17))
AT_TEMPERATURES = tuple(f"nll_at_{eighths}_eighths" for eighths in EIGHTHS)
# Rows at a time whose roots are held beside the softmax.
BLOCK_ROWS = 32


def gaps(log_confidence: Float[Tensor, " n"], right: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """By bin of confidence (0, 1/15], (1/15, 2/15], …: the sum of right − confidence."""
    confidence = log_confidence.exp()
    places = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    each = torch.where(mask, right.to(confidence.dtype) - confidence, 0.0)
    return dict(zip(GAPS, torch.zeros(BINS).to(each).scatter_add_(0, places, each), strict=True))


def powers(softmax: Float[Tensor, "n V"]) -> Float[Tensor, "n powers"]:
    """Σ s^(e/8) over the vocabulary, for each of the exponents; 0 stays 0."""
    found: list[Tensor] = []
    for rows in softmax.split(BLOCK_ROWS):
        root = rows.sqrt().sqrt_().sqrt_()
        power, sums = root.square(), []
        for eighths in EIGHTHS:
            if eighths > EIGHTHS[0]:
                power.mul_(root)
            sums.append(power.sum(dim=1))
        found.append(torch.stack(sums, dim=1))
    return torch.cat(found)


def nll_at_temperatures(
    log_q: Float[Tensor, "n E"], tail: Float[Tensor, "n powers"], label: Float[Tensor, " n"], mask: Tensor
) -> dict[str, Tensor]:
    """Sums of −log softmax(logits / τ) at the label. `log_q` has the distinct entries at τ = 1 (−inf: none), `tail`
    log Σ q^(1/τ) over all other tokens, `label` log q of it."""
    sums: dict[str, Tensor] = {}
    for i, (name, eighths) in enumerate(zip(AT_TEMPERATURES, EIGHTHS, strict=True)):
        inverse = eighths / 8
        normaliser = torch.logaddexp((inverse * log_q).logsumexp(dim=1), tail[:, i])
        sums[name] = torch.where(mask, normaliser - inverse * label, 0.0).sum()
    return sums


def calibration_error(sums: Mapping[str, float], positions: float) -> float:
    """The expected calibration error, in probability, 0 to 1."""
    return sum(abs(sums[name]) for name in GAPS) / max(1.0, positions)


def best_temperature(sums: Mapping[str, float]) -> float:
    """The τ between ½ and 4 of the least NLL, which is convex in 1/τ: by the quartic in log τ through five sums.

    NaN where the sums are not finite.
    """
    values, logs = np.array([sums[name] for name in AT_TEMPERATURES]), np.log(8 / np.array(EIGHTHS))
    if not np.isfinite(values).all():
        return math.nan
    least = int(values.argmin())
    first = min(max(0, least - 2), len(values) - 5)
    around = slice(first, first + 5)
    # Differences to the least: the sums of many positions are large numbers that are nearly equal.
    fitted = Polynomial.fit(logs[around], values[around] - values[least], 4)
    near = (logs[min(least + 1, len(values) - 1)], logs[max(0, least - 1)])
    flat = [float(root.real) for root in fitted.deriv().roots() if root.imag == 0 and near[0] < root.real < near[1]]
    return math.exp(min([float(logs[least]), *flat], key=fitted))
