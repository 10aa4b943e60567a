"""Attention under a mask, also with capped products, s ↦ c · tanh(s / c) (Gemma 2, arXiv 2408.00118).

No kernel of torch for a CPU caps products and has a backward pass. So they are computed as they are written here, and
callers bound the memory by chunks of queries. On a GPU `flex_kernel.py` does the same in one kernel.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _attend_capped(
    q: Float[Tensor, "B H L d"], k: Tensor, v: Tensor, mask: Bool[Tensor, "*B L S"], scale: float | None, cap: float
) -> Float[Tensor, "B H L d"]:
    heads, L = q.shape[1] // k.shape[1], q.shape[2]
    # Queries that share a key head are rows of one matmul, so that keys and values are not repeated.  [B, H_kv, G·L, S]
    rows = rearrange(q, "B (K G) L d -> B K (G L) d", G=heads)
    products = (rows @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # Cap in float32, or in float64 if that is the input's dtype.
    capped = cap * torch.tanh(products.to(torch.promote_types(q.dtype, torch.float32)) / cap)
    # Mask each head's rows alike, then softmax over the keys.  [B, H_kv, G, L, S]
    masked = rearrange(capped, "B K (G L) S -> B K G L S", L=L).masked_fill(~mask.unsqueeze(-3), -torch.inf)
    weights = masked.softmax(dim=-1).to(v.dtype)
    # Sum of values.  [B, H_kv, G·L, d] → [B, H, L, d]
    out = rearrange(weights, "B K G L S -> B K (G L) S") @ v
    return rearrange(out, "B K (G L) d -> B (K G) L d", G=heads)


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
    if not torch.is_grad_enabled():
        return _attend_capped(q, k, v, mask, scale, soft_cap)
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(_attend_capped, q, k, v, mask, scale, soft_cap, **settings)
