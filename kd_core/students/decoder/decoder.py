"""One decoder for the families of `families.py`: grouped-query attention, RoPE, RMSNorm, SwiGLU, by settings.

Parameter names are those of Hugging Face's Llama without the leading `model.`, so that weights need no map.
Built on the meta device, then materialised and filled (`starts.py`).
"""

import os
from collections.abc import Callable
from typing import TypeVar, overload

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.attention import Attention, Segment, document_segments
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.decoder.rope import rotary_angles

R = TypeVar("R")


def scaled(x: Tensor, by: float) -> Tensor:
    """The product, without a pass over `x` where nothing changes."""
    return x if by == 1 else x * by


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202)."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=arch.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual.

    With `recompute`, activations inside are not kept for the backward pass but computed again.
    """

    def __init__(self, arch: Architecture, window: int | None = None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.self_attn = Attention(arch, window)
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
        self.layers = nn.ModuleList(Block(arch, arch.window(layer)) for layer in range(arch.num_layers))
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
        cos, sin = rotary_angles(position_ids, self.arch.head_dim, self.arch.rope_theta, self.arch.rope_scaling)
        segments = document_segments(document_ids)
        x = scaled(self.embed_tokens(tokens), self.arch.embedding_scale)
        for block in self.layers:
            x = block(x, cos, sin, segments)
        hidden = scaled(self.norm(x), self.arch.logit_scale)
        return self.lm_head(hidden)[..., : self.arch.vocab_size] if head is None else head(hidden, self.lm_head.weight)


def meta_decoder(arch: Architecture) -> Decoder:
    """A decoder without memory: names and shapes alone.

    Raises:
        UsageError: heads that do not share keys evenly.
    """
    if arch.num_heads % arch.num_kv_heads:
        raise UsageError(f"{arch.num_heads} attention heads, {arch.num_kv_heads} of keys; wanted a multiple of them.")
    with torch.device("meta"):
        return Decoder(arch)


def materialised(model: Decoder, device: torch.device) -> Decoder:
    """The same decoder with memory on `device`, in float32, without values yet.

    Raises:
        UsageError: this machine has no such memory.
    """
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    needed = sum(each.numel() for each in local) * 4
    if device.type == "cpu" and needed > (there := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise UsageError(f"the student needs {needed / 2**30:.1f} GiB of memory, and {there / 2**30:.1f} are there.")
    model = model.to_empty(device=device)
    model.tie()
    return model
