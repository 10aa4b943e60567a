"""Capped attention over all documents of a batch by one compiled kernel (FlexAttention, arXiv 2412.05496), on a GPU.

Importing it imports torch's compiler, which takes a second, so `attention.py` does that where the kernel runs.
"""

from functools import lru_cache, partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from kd_core.compiling import outside_compiled_graphs
from kd_core.document_lengths import Documents

BLOCK = 128  # queries and keys of one block


@lru_cache(1)
def _compiled(device: str):
    # The first shape has a graph of its own, and further ones share one: dynamo gives up after 8 graphs.
    # Without a GPU, the kernel's own formula runs as it is written.
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def _document_of(cu_seqlens: Tensor, positions: int) -> Tensor:
    """Returns the number of each position's document, counted from 1, [N]."""
    # How many documents begin at it or before it.
    return torch.searchsorted(cu_seqlens, torch.arange(positions, device=cu_seqlens.device), right=True)


def _listed(blocks: Bool[Tensor, "n m"]) -> tuple[Int[Tensor, "1 1 n"], Int[Tensor, "1 1 n m"]]:
    """Returns how many blocks of each row are true, and their numbers before those of the others."""
    return blocks.sum(dim=1).int()[None, None], blocks.int().argsort(dim=1, descending=True, stable=True).int()[
        None, None
    ]


@lru_cache(4)  # layers with a window and layers without one share a mask each, in both slices of divided rows
def _block_mask(documents: Documents, queries: int, keys: int, window: int | None) -> BlockMask:
    """Returns which blocks of queries and keys [N, M] the kernel visits, and which pairs inside them count."""
    cu_q, cu_k = documents.cu_seqlens, (documents.keys or documents).cu_seqlens
    document, device = _document_of(cu_q, queries), cu_q.device
    # A position sees earlier ones of its document, in its window. Its document's last query is at its last key.  [N]
    last = torch.arange(queries, device=device) + (cu_k - cu_q)[document]
    first = cu_k[document - 1].long()
    if window is not None:
        first = torch.maximum(first, last - window + 1)

    # Bounds rise with the query. So a block's first and last query bound which keys any of them sees, or all.  [n, m]
    begin, key = (torch.arange(0, size, BLOCK, device=device) for size in (queries, keys))
    end = (begin + BLOCK - 1).clamp(max=queries - 1)
    key_end, is_whole = key + BLOCK - 1, (begin + BLOCK <= queries)[:, None] & (key + BLOCK <= keys)
    is_visited = (key_end >= first[begin][:, None]) & (key <= last[end][:, None])
    is_full = is_whole & (key >= first[end][:, None]) & (key_end <= last[begin][:, None])
    return BlockMask.from_kv_blocks(
        *_listed(is_visited & ~is_full), *_listed(is_full), BLOCK,
        lambda _batch, _head, query, key: (key >= first[query]) & (key <= last[query]),
        (queries, keys),
    )  # fmt: skip


@outside_compiled_graphs
def attend_capped_by_kernel(  # noqa: PLR0913 (those of `attend`)
    q: Float[Tensor, "B H T d"],
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H T d"]:
    """Returns causal attention inside each document, to the last `window` positions if there is a window."""
    # Documents stand end to end in one row of N = B·T positions. There may be more keys.  [B, H, T, d] → [1, H, N, d]
    q_flat, k_flat, v_flat = (rearrange(x, "B H T d -> 1 H (B T) d") for x in (q, k, v))
    mask = _block_mask(documents, q_flat.shape[2], k_flat.shape[2], window)
    attend = partial(
        _compiled(q.device.type), q_flat, k_flat, v_flat,
        score_mod=None if soft_cap is None else (
            lambda product, _batch, _head, _query, _key: soft_cap * torch.tanh(product / soft_cap)
        ),
        block_mask=mask, scale=scale, enable_gqa=True,
    )  # fmt: skip
    if sinks is None:
        out = attend()
    else:
        # A sink takes its share of the softmax: out · Σ exp(products) / (Σ exp(products) + exp(sink)).  [1, H, N, d]
        out, sums = attend(return_aux=AuxRequest(lse=True))
        assert sums.lse is not None
        out = out * torch.sigmoid(sums.lse - sinks[:, None])[..., None].to(out.dtype)
    return rearrange(out, "1 H (B T) d -> B H T d", B=len(q))
