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


def _attend_with_sinks(
    q: Float[Tensor, "B H L d"], k: Tensor, v: Tensor, mask: Bool[Tensor, "*B L S"], scale: float | None, sinks: Tensor
) -> Float[Tensor, "B H L d"]:
    """Gives each head one more key, whose product with every query is the head's sink, and whose value is 0."""
    channels = q.shape[-1]
    factor = float(channels**-0.5 if scale is None else scale)
    # One more channel holds sink / scale in queries, 1 in the further key and 0 in all others. Kernels take multiples
    # of 8 channels.  [B, H, L, d + 8]
    sink_channel = (sinks / factor).to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)
    q = F.pad(torch.cat([q, sink_channel], dim=-1), (0, 7))
    sink_key = F.one_hot(torch.tensor(channels, device=k.device), channels + 8).to(k.dtype).expand(*k.shape[:2], 1, -1)
    # The further key is the first, visible to all.  [B, H_kv, 1 + S, d + 8], [L, 1 + S]
    k, v = torch.cat([sink_key, F.pad(k, (0, 8))], dim=2), F.pad(v, (0, 8, 1, 0))
    mask = torch.cat([torch.ones_like(mask[..., :1]), mask], dim=-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=factor, enable_gqa=True)[..., :channels]


def attend_masked(  # noqa: PLR0913 (queries, keys, values, and how they attend)
    q: Float[Tensor, "B H L d"],
    k: Tensor,
    v: Tensor,
    mask: Bool[Tensor, "*B L S"],
    scale: float | None,
    soft_cap: float | None,
    sinks: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H L d"]:
    """Returns attention of each query to the keys where the mask is true.

    A head's sink is a logit beside the products, which takes its share of the softmax and adds nothing (gpt-oss).
    With a soft cap, products are not kept for the backward pass, which computes them again.
    """
    if sinks is not None:
        assert soft_cap is None, "no family has both"
        return _attend_with_sinks(q, k, v, mask, scale, sinks)
    if soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return _CappedAttention.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, soft_cap)
