"""A Llama-family decoder: grouped-query attention, RoPE, RMSNorm, SwiGLU, tied or untied embeddings, Granite's scales.

Parameter names are those of Hugging Face's Llama without the leading `model.`, so that weights need no map.
Built on the meta device, then materialised and loaded (`weights.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

R = TypeVar("R")
Segment = tuple[int, int, int]


@dataclass(frozen=True)
class Architecture:
    """The numbers that fix a decoder's shape and arithmetic.

    `padded_vocab_size` is how many rows embedding and head have, where that is more than the real vocabulary: the
    others are no tokens. The scales are Granite's; `attention_scale` is 1/√head_dim where it is None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_positions: int
    padded_vocab_size: int | None = None
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Scale each position to unit root mean square, then by the weight."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_angles(
    position_ids: Int[Tensor, "B T"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "B 1 T d"], Float[Tensor, "B 1 T d"]]:
    """Cosine and sine of RoPE (arXiv 2104.09864), in float32, in Hugging Face's half-split layout."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * (1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B H T d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B H T d"]:
    """Turn pairs (i, i + d/2) by their position's angle."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def document_segments(document_ids: Int[Tensor, "B T"]) -> list[Segment] | None:
    """Runs of equal document id as (row, start, end); None where every row is one document."""
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    if int(starts.sum()) == len(document_ids):
        return None
    T = document_ids.shape[1]
    begins: list[list[int]] = starts.nonzero().tolist()
    ends = [later[1] if later[0] == row else T for (row, _), later in zip(begins, [*begins[1:], [-1, 0]], strict=True)]
    return [(row, start, end) for (row, start), end in zip(begins, ends, strict=True)]


def attend(
    q: Tensor, k: Tensor, v: Tensor, segments: list[Segment] | None, scale: float | None = None
) -> Float[Tensor, "B H T d"]:
    """Causal attention inside each document; no T x T mask is made, and no position sees a neighbour document."""
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    rows: list[list[Tensor]] = [[] for _ in range(len(q))]
    for row, start, end in segments:
        of_q, of_k, of_v = (x[row : row + 1, :, start:end] for x in (q, k, v))
        found = F.scaled_dot_product_attention(of_q, of_k, of_v, is_causal=True, scale=scale, enable_gqa=True)
        rows[row].append(found)
    return torch.cat([torch.cat(row, dim=2) for row in rows])


def scaled(x: Tensor, by: float) -> Tensor:
    """The product, without a pass over `x` where nothing changes."""
    return x if by == 1 else x * by


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.head_dim, self.scale = arch.head_dim, arch.attention_scale
        self.own_kv_heads: slice | None = None  # where tensor parallelism repeats key and value heads
        width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q_proj = nn.Linear(arch.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(arch.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(arch.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, arch.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: list[Segment] | None) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = (
            rearrange(proj(x), "B T (H d) -> B H T d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.own_kv_heads is not None:
            k, v = k[:, self.own_kv_heads], v[:, self.own_kv_heads]
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, segments, self.scale)
        return self.o_proj(rearrange(out, "B H T d -> B T (H d)"))


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202)."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual.

    With `recompute`, activations inside are not kept for the backward pass but computed again.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.self_attn = Attention(arch)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.mlp = SwiGLU(arch)
        self.residual_scale = arch.residual_scale
        self.recompute = False

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: list[Segment] | None) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, x, cos, sin, segments, use_reentrant=False)
        return self.run(x, cos, sin, segments)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, segments: list[Segment] | None) -> Tensor:
        """What `forward` computes."""
        x = x + scaled(self.self_attn(self.input_layernorm(x), cos, sin, segments), self.residual_scale)
        return x + scaled(self.mlp(self.post_attention_layernorm(x)), self.residual_scale)


class Decoder(nn.Module):
    """Tokens in; logits out, or whatever `head` makes of hidden states and the output head's weight."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.embed_tokens = nn.Embedding(arch.vocab_rows, arch.hidden_size)
        self.layers = nn.ModuleList(Block(arch) for _ in range(arch.num_layers))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_rows, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the head share the embedding's weight where the architecture says so (again after `to_empty`)."""
        if self.arch.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @overload
    def forward(self, tokens: Tensor, position_ids: Tensor, document_ids: Tensor) -> Tensor: ...
    @overload
    def forward(
        self, tokens: Tensor, position_ids: Tensor, document_ids: Tensor, head: Callable[[Tensor, Tensor], R]
    ) -> R: ...
    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        document_ids: Int[Tensor, "B T"],
        head: Callable[[Tensor, Tensor], R] | None = None,
    ) -> Tensor | R:
        """Logits [B, T, V], or `head(hidden [B, T, D], weight)`: logits are their product, of the first V rows.

        A scale of the logits is on the hidden states already, so that whoever multiplies gets it.

        The loss enters here as `head` because sharded data parallelism needs every use of the parameters
        inside the root module's forward.
        """
        cos, sin = rotary_angles(position_ids, self.arch.head_dim, self.arch.rope_theta)
        segments = document_segments(document_ids)
        x = scaled(self.embed_tokens(tokens), self.arch.embedding_scale)
        for block in self.layers:
            x = block(x, cos, sin, segments)
        hidden = scaled(self.norm(x), self.arch.logit_scale)
        return self.lm_head(hidden)[..., : self.arch.vocab_size] if head is None else head(hidden, self.lm_head.weight)


def parameter_count(arch: Architecture) -> int:
    """Parameters of a decoder, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(arch).parameters())
