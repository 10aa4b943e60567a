"""Rotary positions (arXiv 2104.09864), and the ways to stretch them beyond the context that a model was trained on.

A scaling changes the frequencies, and may multiply cosine and sine; it depends on nothing but the configuration, so
a position's angles are the same in a short row and in a long one.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Float[Tensor, " half"]:
    """Radians a position for each pair of a head's channels, float32: theta^(−2i/head_dim)."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponent


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (arXiv 2306.15595)."""

    factor: float

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        return 1.0

    def scaled(self, plain: Float[Tensor, " half"], theta: float) -> Float[Tensor, " half"]:
        """Frequencies out of the unscaled ones."""
        del theta
        return plain / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Waves longer than the original context are stretched, short ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        return 1.0

    def scaled(self, plain: Float[Tensor, " half"], theta: float) -> Float[Tensor, " half"]:
        """Frequencies out of the unscaled ones."""
        del theta
        turns = self.original_positions * plain / (2 * math.pi)  # of a wave over the original context
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return torch.lerp(plain / self.factor, plain, kept)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): pairs that turn often over the original context are kept, slow ones stretched.

    Between the pairs that make `beta_fast` and `beta_slow` turns the blend is linear in the pair's index;
    `whole_pairs` rounds these two bounds outwards. `amplitude` is the paper's √(1/t) = 0.1·ln(factor) + 1 by default.
    """

    factor: float
    original_positions: int
    amplitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_pairs: bool = True

    def _pair(self, turns: float, head_dim: int, theta: float) -> float:
        """The (fractional) index of the pair that makes so many turns over the original context."""
        return head_dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def scaled(self, plain: Float[Tensor, " half"], theta: float) -> Float[Tensor, " half"]:
        """Frequencies out of the unscaled ones."""
        head_dim = 2 * len(plain)
        low, high = self._pair(self.beta_fast, head_dim, theta), self._pair(self.beta_slow, head_dim, theta)
        if self.whole_pairs:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        index = torch.arange(len(plain), device=plain.device, dtype=torch.float32)
        stretched = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
        return torch.lerp(plain, plain / self.factor, stretched)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def rotary_angles(
    position_ids: Int[Tensor, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Tensor, "B 1 T d"], Float[Tensor, "B 1 T d"]]:
    """Cosine and sine, in float32, in Hugging Face's half-split layout."""
    per_position = frequencies(head_dim, theta, position_ids.device)
    if scaling is not None:
        per_position = scaling.scaled(per_position, theta)
    angles = position_ids[:, None, :, None].float() * per_position
    angles = torch.cat([angles, angles], dim=-1)
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(x: Float[Tensor, "B H T d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B H T d"]:
    """Turn pairs (i, i + d/2) by their position's angle."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
