"""Attention over all documents of a batch by one variable-length kernel of torch (Flash Attention).

Importing it imports torch's compiler, which takes a second, so `attention.py` does that where the kernel runs.
"""

import inspect
from typing import Any, cast

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from kd_core.document_lengths import Documents

# Torch 2.11 takes fewer key heads than heads of queries without being asked, later versions with this argument.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attend_by_kernel(
    q: Float[Tensor, "B H T d"], k: Tensor, v: Tensor, documents: Documents, scale: float | None, window: int | None
) -> Float[Tensor, "B H T d"]:
    """Returns causal attention inside each document, to the last `window` positions if there is a window."""
    # Documents stand end to end in N = B·T positions.  [B, H, T, d] → [N, H, d]
    q_flat, k_flat, v_flat = (rearrange(x, "B H T d -> (B T) H d") for x in (q, k, v))
    # The kernel counts positions to the left of a query without itself: −1 is all of them, and 0 to the right.
    left = -1 if window is None else window - 1
    # Where a document has more keys than queries, its last queries are aligned with its last keys.
    keys = documents.keys or documents
    bounds = documents.cu_seqlens, keys.cu_seqlens, documents.longest, keys.longest
    out = varlen_attn(q_flat, k_flat, v_flat, *bounds, scale=scale, window_size=(left, 0), **GROUPED)
    return rearrange(cast(Tensor, out), "(B T) H d -> B H T d", B=len(q))
