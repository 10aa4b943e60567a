"""Causal attention inside documents, over all earlier positions or a window of them, without a T × T mask."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_core.compiling import outside_compiled_graphs
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.kv_cache import LayerCache
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.decoder.rope import rotate

Segment = tuple[int, int, int]
# Queries of one chunk share a band mask [QUERIES, QUERIES + window]. A window costs as if it were this much wider.
QUERIES = 512


def document_segments(document_ids: Int[Tensor, "B T"]) -> list[Segment] | None:
    """Returns the runs of equal document id as (row, start, end), or None if every row is one document."""
    # A document starts at position 0 of every row, and wherever the id differs from the one before.  [B, T] bool
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    if int(starts.sum()) == len(document_ids):
        return None
    T = document_ids.shape[1]
    begins: list[list[int]] = starts.nonzero().tolist()  # (row, start), in order
    # A document ends where the next one of its row starts, or at T. (−1, 0) follows the last document.
    ends = [after[1] if after[0] == row else T for (row, _), after in zip(begins, [*begins[1:], [-1, 0]], strict=True)]
    return [(row, start, end) for (row, start), end in zip(begins, ends, strict=True)]


def _attend_in_windows(
    q: Float[Tensor, "B H T d"], k: Tensor, v: Tensor, scale: float | None, window: int
) -> Float[Tensor, "B H T d"]:
    """Attends from each position to the last `window` positions, itself included, in chunks of queries.

    Each chunk reads only the keys that its queries attend to, so the cost is linear in T.
    """
    T, size = q.shape[2], min(QUERIES, window)
    outputs: list[Tensor] = []
    for start in range(0, T, size):
        # Queries [start, end) attend to keys [first, end).
        end, first = min(start + size, T), max(0, start - window + 1)
        query = torch.arange(start, end, device=q.device)[:, None]
        key = torch.arange(first, end, device=q.device)
        # Band mask: query − window < key ≤ query.  [end − start, end − first]
        band = (key <= query) & (key > query - window)
        chunks = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
        outputs.append(F.scaled_dot_product_attention(*chunks, attn_mask=band, scale=scale, enable_gqa=True))
    return torch.cat(outputs, dim=2)


def attend_document(
    q: Float[Tensor, "B H T d"], k: Tensor, v: Tensor, scale: float | None, window: int | None
) -> Float[Tensor, "B H T d"]:
    """Returns causal attention in rows of one document each."""
    if window is not None and window < q.shape[2]:
        return _attend_in_windows(q, k, v, scale, window)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@outside_compiled_graphs
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: list[Segment] | LayerCache | None,
    scale: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "B H T d"]:
    """Returns causal attention inside each document. No position attends to another document.

    With a cache, a row is one document, and its earlier positions are in the cache.
    """
    if isinstance(segments, LayerCache):
        return segments.attend(q, k, v, scale, window)
    if segments is None:
        return attend_document(q, k, v, scale, window)
    # Documents stand end to end, so one split gives the positions of each. Its backward pass is one concatenation.
    # Slices would each write a gradient as large as the whole tensor.  [B, H, T, d] → [L, H, d] each
    lengths = [end - start for _, start, end in segments]
    parts = [rearrange(x, "B H T d -> (B T) H d").split(lengths) for x in (q, k, v)]
    # One call for each document, as [1, H, L, d].
    outputs: list[Tensor] = []
    for document in zip(*parts, strict=True):
        q_doc, k_doc, v_doc = (rearrange(x, "L H d -> 1 H L d") for x in document)
        outputs.append(rearrange(attend_document(q_doc, k_doc, v_doc, scale, window), "1 H L d -> L H d"))
    return rearrange(torch.cat(outputs), "(B T) H d -> B H T d", B=len(q))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), with norms of queries and keys if the architecture has them."""

    def __init__(self, arch: Architecture, window: int | None = None) -> None:
        super().__init__()
        self.head_dim, self.scale, self.window = arch.head_dim, arch.attention_scale, window
        self.kv_head_slice: slice | None = None  # this rank's, where tensor parallelism repeats key and value heads
        width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q_proj = nn.Linear(arch.hidden_size, width, bias=arch.qkv_bias)
        self.k_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.v_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.o_proj = nn.Linear(width, arch.hidden_size, bias=arch.o_bias)
        self.q_norm = RMSNorm(arch.head_dim, arch.norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch.norm_eps) if arch.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: list[Segment] | LayerCache | None) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        # Project, and split channels into attention heads of d.  [B, H, T, d], and H_kv heads of keys and values
        q, k, v = (
            rearrange(proj(x), "B T (H d) -> B H T d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Every rank has computed all key and value heads: select this rank's.
        if self.kv_head_slice is not None:
            k, v = k[:, self.kv_head_slice], v[:, self.kv_head_slice]
        # Norm each head of queries and keys over d (Qwen 3).
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # Rotate by position, then softmax(q kᵀ · scale) v inside documents.  [B, H, T, d]
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, segments, self.scale, self.window)
        return self.o_proj(rearrange(out, "B H T d -> B T (H d)"))
