"""Attention under a mask, also with capped products, s ↦ c · tanh(s / c) (Gemma 2, arXiv 2408.00118).

No kernel of torch for a CPU caps products and has a backward pass. So they are computed as they are written here, and
callers bound the memory by chunks of queries. On a GPU `flex_kernel.py` does the same in one kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def _capped_weights(
    rows: Float[Tensor, "B K GL d"], k: Tensor, mask: Bool[Tensor, "*B L S"], scale: float, cap: float
) -> tuple[Float[Tensor, "B K GL S"], Float[Tensor, "B K GL S"]]:
    """Returns tanh(products / cap) and the softmax of the capped products, in float32 at least."""
    tanh = (rows @ k.mT).to(torch.promote_types(rows.dtype, torch.float32)).mul_(scale / cap).tanh_()
    # Mask each head's rows alike, then softmax over the keys.  [B, H_kv, G, L, S]
    heads = (tanh * cap).unflatten(2, (-1, mask.shape[-2])).masked_fill_(~mask.unsqueeze(-3), -torch.inf)
    return tanh, heads.softmax(dim=-1).flatten(2, 3)


class _CappedAttention(torch.autograd.Function):
    """Attention with capped products, which the backward pass computes again."""

    @staticmethod
    def forward(  # noqa: PLR0913 (those of `attend_masked`)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float
    ) -> Float[Tensor, "B H L d"]:
        # Queries that share a key head are rows of one matmul, so keys and values are not repeated.  [B, H_kv, G·L, d]
        rows = rearrange(q, "B (K G) L d -> B K (G L) d", K=k.shape[1])
        _, weights = _capped_weights(rows, k, mask, scale, cap)
        out = weights.to(v.dtype) @ v
        ctx.save_for_backward(rows, k, v, mask, out)
        ctx.scale, ctx.cap = scale, cap
        return rearrange(out, "B K (G L) d -> B (K G) L d", L=q.shape[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, k, v, mask, out = ctx.saved_tensors
        grad = rearrange(gradients[0], "B (K G) L d -> B K (G L) d", K=k.shape[1])
        tanh, weights = _capped_weights(rows, k, mask, ctx.scale, ctx.cap)
        dv = weights.to(grad.dtype).mT @ grad
        # dS = P ⊙ (dO Vᵀ − Σ dO ⊙ O), and the cap's slope is 1 − tanh².  [B, H_kv, G·L, S]
        mean = (grad * out).sum(dim=-1, keepdim=True, dtype=weights.dtype)
        dproducts = (grad @ v.mT).to(weights.dtype).sub_(mean).mul_(weights)
        dproducts = dproducts.mul_(tanh.square_().neg_().add_(1)).mul_(ctx.scale).to(rows.dtype)
        dq = rearrange(dproducts @ k, "B K (G L) d -> B (K G) L d", L=mask.shape[-2])
        return dq, dproducts.mT @ rows, dv, None, None, None


def attend_masked(
    q: Float[Tensor, "B H L d"],
    k: Tensor,
    v: Tensor,
    mask: Bool[Tensor, "*B L S"],
    scale: float | None,
    soft_cap: float | None,
) -> Float[Tensor, "B H L d"]:
    """Returns attention of each query to the keys where the mask is true.

    With a soft cap, products are not kept for the backward pass, which computes them again.
    """
    if soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return _CappedAttention.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, soft_cap)
