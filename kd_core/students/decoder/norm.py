"""Root-mean-square norm."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32.

    The factor on each channel is `offset` + weight. The offset is 1 in Gemma, whose weights begin at 0.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset = eps, offset

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Scales each position to unit root mean square, then by the factors.

        A bfloat16 result is rounded before the weight and again after it. transformers rounds in the same places in
        most families. In OLMo 2, OLMo 3 and gpt-oss it rounds once. With an offset both round once.
        """
        if self.offset:
            factor = self.offset + self.weight.float()
            return F.rms_norm(x.float(), self.weight.shape, factor, self.eps).to(x.dtype)
        # x / √(mean(x²) + eps) · weight, by one kernel where nothing is rounded in between.  [*B, D]
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight.float(), self.eps)
        unit = F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
        # The float32 weight makes the product float32 again: round it a second time.  [*B, D]
        return (self.weight * unit).to(x.dtype)


class ProjectionNorm(RMSNorm):
    """Root-mean-square norm over the channels of all heads, which tensor parallelism divides (OLMo 2)."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Scales each position as `RMSNorm` does, where ranks may hold channels each."""
        if not isinstance(x, DTensor):
            return super().forward(x)
        # Each rank's squares make a partial mean. Adding these up sends one number a position.  [*B, 1]
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        unit = (x.float() * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
        return (self.weight * unit).to(x.dtype)
