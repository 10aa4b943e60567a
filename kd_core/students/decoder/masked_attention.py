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
    if not torch.is_grad_enabled():
        return _attend_capped(q, k, v, mask, scale, soft_cap)
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(_attend_capped, q, k, v, mask, scale, soft_cap, **settings)
