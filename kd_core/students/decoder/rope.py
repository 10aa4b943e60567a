"""Rotary positions (arXiv 2104.09864), and scalings that stretch them beyond the context that a model was trained on.

A scaling changes the frequencies, and may multiply cosine and sine by an amplitude. It depends on the configuration
alone, so a position has the same angles in a short row and in a long one.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


def frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Float[Tensor, " half"]:
    """Returns radians per position for each pair of an attention head's channels, float32: theta^(−2i/head_dim)."""
    # 2i / head_dim for pair i.  [head_dim / 2]
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponent


@dataclass(frozen=True)
class LinearScaling:
    """Linear scaling: positions are divided by `factor` (arXiv 2306.15595)."""

    factor: float

    @property
    def amplitude(self) -> float:
        return 1.0

    def scaled(self, plain: Float[Tensor, " half"], theta: float) -> Float[Tensor, " half"]:
        del theta
        return plain / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Scaling of Llama 3.1: stretches long waves by `factor`, keeps short ones, and blends those between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    @property
    def amplitude(self) -> float:
        return 1.0

    def scaled(self, plain: Float[Tensor, " half"], theta: float) -> Float[Tensor, " half"]:
        del theta
        # Turns of each pair over the original context. The blend goes from 0 (stretched) at `low_freq_factor` turns to
        # 1 (unchanged) at `high_freq_factor` turns.  [half]
        turns = self.original_positions * plain / (2 * math.pi)
        blend = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return torch.lerp(plain / self.factor, plain, blend)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): keeps pairs that turn often over the original context, and stretches slow ones.

    Between the pairs that make `beta_fast` and `beta_slow` turns, the blend is linear in the pair's index.
    `whole_pairs` rounds these two bounds outwards. `amplitude` is the paper's √(1/t) = 0.1·ln(factor) + 1 by default.
    """

    factor: float
    original_positions: int
    amplitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_pairs: bool = True

    def _index(self, turns: float, head_dim: int, theta: float) -> float:
        """Returns the fractional index of the pair that makes `turns` turns over the original context."""
        # Solve original_positions · theta^(−2i/head_dim) = 2π · turns for i.
        return head_dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def scaled(self, plain: Float[Tensor, " half"], theta: float) -> Float[Tensor, " half"]:
        head_dim = 2 * len(plain)
        # Pairs up to `low` are kept, pairs from `high` on are stretched.
        low, high = self._index(self.beta_fast, head_dim, theta), self._index(self.beta_slow, head_dim, theta)
        if self.whole_pairs:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # The share of stretching rises from 0 to 1 between them.  [half]
        index = torch.arange(len(plain), device=plain.device, dtype=torch.float32)
        stretched = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
        return torch.lerp(plain, plain / self.factor, stretched)


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): each pair is stretched by a factor of its own.

    `short_factor` holds in rows of up to `original_positions` positions, `long_factor` in longer ones. An angle would
    then depend on the length of the row, so longer rows are refused (`Architecture.longest_document`).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_positions: int
    amplitude: float

    def scaled(self, plain: Float[Tensor, " half"], theta: float) -> Float[Tensor, " half"]:
        del theta
        return plain / torch.tensor(self.short_factor, device=plain.device)


# Each has `scaled`, from plain frequencies [half] to scaled ones, and `amplitude`, a factor on cosine and sine.
RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling
# The channels of a pair: i and i + d/2 (Llama), or 2i and 2i + 1 (GLM).
RotaryPairs = Literal["halves", "neighbours"]


def rotary_angles(
    position_ids: Int[Tensor, "B T"],
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    pairs: RotaryPairs = "halves",
) -> tuple[Float[Tensor, "B 1 T d"], Float[Tensor, "B 1 T d"]]:
    """Returns cosine and sine of the angles of `rotary_dim` channels, in float32.

    The sine of each pair's first channel is negative, as `rotate` needs it.
    """
    # Radians per position, with scaling.  [d/2]
    per_position = frequencies(rotary_dim, theta, position_ids.device)
    if scaling is not None:
        per_position = scaling.scaled(per_position, theta)
    amplitude = 1.0 if scaling is None else scaling.amplitude
    # Both channels of a pair have the same angle.  [B, 1, T, d/2] → [B, 1, T, d]
    angles = position_ids[:, None, :, None].float() * per_position
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    if pairs == "neighbours":
        return torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(
    x: Float[Tensor, "B H T d"], cos: Tensor, sin: Tensor, pairs: RotaryPairs = "halves"
) -> Float[Tensor, "B H T d"]:
    """Rotates the channel pairs by the angles of their position. Channels beyond those of the angles stay."""
    if cos.shape[-1] < x.shape[-1]:
        turned, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat([rotate(turned, cos, sin, pairs), still], dim=-1)
    # (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin). `sin` is (−sin, sin), so that no channel is negated here, and
    # float32 makes products float32.  [B, H, T, d]
    if pairs == "neighbours":
        exchanged = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        exchanged = torch.cat([second, first], dim=-1)
    return (x * cos + exchanged * sin).to(x.dtype)
