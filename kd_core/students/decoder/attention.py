"""Causal attention inside documents, over all positions before or a window of them; no T x T mask is ever made."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_core.compiling import outside_compiled_graphs
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.decoder.rope import rotate

Segment = tuple[int, int, int]
# Queries that share one band mask of QUERIES x (QUERIES + window); the work is that of a window this much wider.
QUERIES = 512


def document_segments(document_ids: Int[Tensor, "B T"]) -> list[Segment] | None:
    """Runs of equal document id as (row, start, end); None where every row is one document."""
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    if int(starts.sum()) == len(document_ids):
        return None
    T = document_ids.shape[1]
    begins: list[list[int]] = starts.nonzero().tolist()
    ends = [later[1] if later[0] == row else T for (row, _), later in zip(begins, [*begins[1:], [-1, 0]], strict=True)]
    return [(row, start, end) for (row, start), end in zip(begins, ends, strict=True)]


def _attend_in_windows(
    q: Float[Tensor, "B H T d"], k: Tensor, v: Tensor, scale: float | None, window: int
) -> Float[Tensor, "B H T d"]:
    """Each position sees the last `window`, its own included: some queries at a time, with the keys that they see."""
    T, size = q.shape[2], min(QUERIES, window)
    found: list[Tensor] = []
    for start in range(0, T, size):
        end, first = min(start + size, T), max(0, start - window + 1)
        query = torch.arange(start, end, device=q.device)[:, None]
        key = torch.arange(first, end, device=q.device)
        seen = (key <= query) & (key > query - window)
        parts = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
        found.append(F.scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale, enable_gqa=True))
    return torch.cat(found, dim=2)


def attend_document(
    q: Float[Tensor, "B H T d"], k: Tensor, v: Tensor, scale: float | None, window: int | None
) -> Float[Tensor, "B H T d"]:
    """Causal attention where each row is one document."""
    if window is not None and window < q.shape[2]:
        return _attend_in_windows(q, k, v, scale, window)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@outside_compiled_graphs
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: list[Segment] | None,
    scale: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "B H T d"]:
    """Causal attention inside each document; no position sees a neighbour document."""
    if segments is None:
        return attend_document(q, k, v, scale, window)
    rows: list[list[Tensor]] = [[] for _ in range(len(q))]
    for row, start, end in segments:
        of_q, of_k, of_v = (x[row : row + 1, :, start:end] for x in (q, k, v))
        rows[row].append(attend_document(of_q, of_k, of_v, scale, window))
    return torch.cat([torch.cat(row, dim=2) for row in rows])


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), with norms of queries and keys where the architecture has them."""

    def __init__(self, arch: Architecture, window: int | None = None) -> None:
        super().__init__()
        self.head_dim, self.scale, self.window = arch.head_dim, arch.attention_scale, window
        self.own_kv_heads: slice | None = None  # where tensor parallelism repeats key and value heads
        width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q_proj = nn.Linear(arch.hidden_size, width, bias=arch.qkv_bias)
        self.k_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.v_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.o_proj = nn.Linear(width, arch.hidden_size, bias=arch.o_bias)
        self.q_norm = RMSNorm(arch.head_dim, arch.norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch.norm_eps) if arch.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: list[Segment] | None) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = (
            rearrange(proj(x), "B T (H d) -> B H T d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.own_kv_heads is not None:
            k, v = k[:, self.own_kv_heads], v[:, self.own_kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, segments, self.scale, self.window)
        return self.o_proj(rearrange(out, "B H T d -> B T (H d)"))
