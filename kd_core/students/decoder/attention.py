"""Causal attention inside documents, over all earlier positions or a window of them, without a T × T mask.

    packed rows, or a window, on a GPU   → one variable-length kernel over all documents (`varlen_kernel.py`)
    rows of one document                 → `scaled_dot_product_attention`, whose kernels are the fastest for them
    packed rows elsewhere                → `scaled_dot_product_attention` of each document
    capped products, or sinks            → one compiled kernel on a GPU (`flex_kernel.py`), else chunks of queries
    rows divided over ranks              → any of these for each slice of a row, to the gathered keys before it

The kernel takes bfloat16 and float16. Float32 and float64 have no such kernel in torch, so they go by document.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kd_core.compiling import outside_compiled_graphs
from kd_core.document_lengths import Documents
from kd_core.row_shares import DividedDocuments, PackedDocuments
from kd_core.sharded_values import gather_positions, local_values
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.kv_cache import LayerCache
from kd_core.students.decoder.masked_attention import attend_masked
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.decoder.rope import RotaryPairs, rotate
from kd_core.students.decoder.shared_cast import cast_once

# Queries of one chunk share a band mask [QUERIES, QUERIES + window]. A window costs as if it were this much wider.
QUERIES = 512
# Capped products are computed for every pair of a chunk, so smaller chunks compute fewer that the mask hides.
CAPPED_QUERIES = 128
# The variable-length kernel takes these, and attention heads of a multiple of 8 channels, up to 256.
KERNEL_DEVICES, KERNEL_DTYPES, KERNEL_WIDTHS = ("cuda",), (torch.bfloat16, torch.float16), range(8, 257, 8)
# That of capped products takes these of them.
FLEX_WIDTHS = (16, 32, 64, 128, 256)


def _attend_in_windows(
    q: Float[Tensor, "B H T d"], k: Tensor, v: Tensor, scale: float | None, window: int, *settings: Any
) -> Float[Tensor, "B H T d"]:
    """Attends from each position to the last `window` positions, itself included, in chunks of queries.

    Each chunk reads only the keys that its queries attend to, so the cost is linear in T. Of more keys than queries,
    the last are those of the queries' positions.
    """
    soft_cap, before = settings[0], k.shape[2] - q.shape[2]
    T, size = q.shape[2], min(QUERIES if soft_cap is None else CAPPED_QUERIES, window)
    outputs: list[Tensor] = []
    for begin in range(0, T, size):
        # Queries at positions [start, end) attend to keys [first, end).
        start, end = before + begin, before + min(begin + size, T)
        first = max(0, start - window + 1)
        query = torch.arange(start, end, device=q.device)[:, None]
        key = torch.arange(first, end, device=q.device)
        # Band mask: query − window < key ≤ query.  [end − start, end − first]
        band = (key <= query) & (key > query - window)
        chunks = q[:, :, begin : begin + size], k[:, :, first:end], v[:, :, first:end]
        outputs.append(attend_masked(*chunks, band, scale, *settings))
    return torch.cat(outputs, dim=2)


def attend_document(  # noqa: PLR0913 (queries, keys, values, and how they attend)
    q: Float[Tensor, "B H T d"],
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Float[Tensor, "B H T d"]:
    """Returns causal attention in rows of one document each, whose keys may be more than its queries."""
    positions = k.shape[2]
    reach = min(window or positions, positions)
    if reach < positions or positions > q.shape[2] or soft_cap is not None or sinks is not None:
        return _attend_in_windows(q, k, v, scale, reach, soft_cap, sinks)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@outside_compiled_graphs
def _attend_by_document(
    q: Float[Tensor, "B H T d"], k: Tensor, v: Tensor, documents: Documents, *settings: Any
) -> Float[Tensor, "B H T d"]:
    if documents.whole_rows:
        return attend_document(q, k, v, *settings)
    # Documents stand end to end, so one split gives the positions of each. Its backward pass is one concatenation.
    # Slices would each write a gradient as large as the whole tensor.  [B, H, T, d] → [L, H, d] each
    keys = documents.keys or documents
    parts = [
        rearrange(x, "B H T d -> (B T) H d").split(list(of_x.lengths))
        for x, of_x in zip((q, k, v), (documents, keys, keys), strict=True)
    ]
    # One call for each document, as [1, H, L, d].
    outputs: list[Tensor] = []
    for document in zip(*parts, strict=True):
        q_doc, k_doc, v_doc = (rearrange(x, "L H d -> 1 H L d") for x in document)
        outputs.append(rearrange(attend_document(q_doc, k_doc, v_doc, *settings), "1 H L d -> L H d"))
    return rearrange(torch.cat(outputs), "(B T) H d -> B H T d", B=len(q))


@outside_compiled_graphs
def _attend_divided(
    q: Float[Tensor, "B H T d"], k: Tensor, v: Tensor, documents: DividedDocuments, *settings: Any
) -> Float[Tensor, "B H T d"]:
    """Attends from this rank's positions to those before them, whichever rank holds these."""
    # Keys and values of whole rows, in one collective.  [2, B, H_kv, T, d] → [2, B, H_kv, T · size, d]
    keys, values = gather_positions(torch.stack([k, v]), documents.share, dim=3)
    outputs = [
        # The keys that this slice of each row attends to, end to end.  [1, H_kv, L, d]
        attend(queries, part.keys_of(keys), part.keys_of(values), part.documents, *settings)
        for part, queries in zip(documents.slices, q.chunk(2, dim=2), strict=True)
    ]
    return torch.cat(outputs, dim=2)


def attend(  # noqa: PLR0913 (queries, keys, values, and how they attend)
    q: Float[Tensor, "B H T d"],
    k: Tensor,
    v: Tensor,
    documents: PackedDocuments | LayerCache,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H T d"]:
    """Returns causal attention inside each document. No position attends to another document.

    With a cache, a row is one document, and its earlier positions are in the cache.
    """
    if isinstance(documents, LayerCache):
        return documents.attend(q, k, v, scale, window, soft_cap, sinks)
    if isinstance(documents, DividedDocuments):
        return _attend_divided(q, k, v, documents, scale, window, soft_cap, sinks)
    # Only what a graph may depend on is read here: a loop over documents stays outside of compiled graphs.
    has_kernel = q.device.type in KERNEL_DEVICES and q.dtype in KERNEL_DTYPES and q.shape[-1] in KERNEL_WIDTHS
    is_plain = soft_cap is None and sinks is None
    if not is_plain and has_kernel and q.shape[-1] in FLEX_WIDTHS:
        from kd_core.students.decoder.flex_kernel import attend_capped_by_kernel  # noqa: PLC0415 (imports the compiler)

        return attend_capped_by_kernel(q, k, v, documents, scale, window, soft_cap, sinks)
    if not is_plain or not has_kernel:
        return _attend_by_document(q, k, v, documents, scale, window, soft_cap, sinks)
    if documents.whole_rows and (window is None or window >= q.shape[2]):
        return attend_document(q, k, v, scale, None)
    from kd_core.students.decoder.varlen_kernel import attend_by_kernel  # noqa: PLC0415 (imports the compiler)

    return attend_by_kernel(q, k, v, documents, scale, window)


class Sinks(nn.Module):
    """A learnt logit of each head that takes a share of its attention (arXiv 2309.17453)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads))

    def forward(self) -> Float[Tensor, " H"]:
        """Returns those of this rank's heads."""
        return local_values(self.weight)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), with norms of queries and keys if the architecture has them."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.head_dim, self.scale, self.window = arch.head_dim, arch.attention_scale, arch.window(layer)
        self.has_rope = arch.has_rope(layer)
        self.rotary_pairs: RotaryPairs = arch.rotary_pairs
        self.soft_cap = arch.attention_soft_cap
        self.kv_head_slice: slice | None = None  # this rank's, where tensor parallelism repeats key and value heads
        width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q_proj = nn.Linear(arch.hidden_size, width, bias=arch.qkv_bias)
        self.k_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.v_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.o_proj = nn.Linear(width, arch.hidden_size, bias=arch.o_bias)
        self.q_norm = RMSNorm(arch.head_dim, arch.norm_eps, arch.norm_offset) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch.norm_eps, arch.norm_offset) if arch.qk_norm else None
        self.sinks = Sinks(arch.num_heads) if arch.attention_sinks else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of [B, T, D], with the channels of all heads side by side."""
        q_x, k_x, v_x = cast_once(x, self.q_proj, self.k_proj, self.v_proj)
        return self.q_proj(q_x), self.k_proj(k_x), self.v_proj(v_x)

    def norm_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Norms each head of queries and keys over d (Qwen 3)."""
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: PackedDocuments | LayerCache) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        # Project, and split channels into attention heads of d.  [B, H, T, d], and H_kv heads of keys and values
        q, k, v = (rearrange(flat, "B T (H d) -> B H T d", d=self.head_dim) for flat in self.project(x))
        # Every rank has computed all key and value heads: select this rank's.
        if self.kv_head_slice is not None:
            k, v = k[:, self.kv_head_slice], v[:, self.kv_head_slice]
        q, k = self.norm_heads(q, k)
        # Rotate by position, then softmax(q kᵀ · scale) v inside documents.  [B, H, T, d]
        if self.has_rope:
            q, k = rotate(q, cos, sin, self.rotary_pairs), rotate(k, cos, sin, self.rotary_pairs)
        sinks = None if self.sinks is None else self.sinks()
        out = attend(q, k, v, documents, self.scale, self.window, self.soft_cap, sinks)
        return self.o_proj(rearrange(out, "B H T d -> B T (H d)"))
