"""One decoder for all families of `huggingface/config_json.py`: grouped-query attention, RoPE, RMSNorm, SwiGLU.

Parameter names are those of Hugging Face's Llama without the leading `model.`, so that weights need no map of names.
A decoder is built on the meta device, then allocated (`allocate`) and filled (`starts/`).
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


def scale(x: Tensor, by: float) -> Tensor:
    """Returns `x · by`, without a pass over `x` if `by` is 1."""
    return x if by == 1 else x * by


class SwiGLU(nn.Module):
    """Gated feed-forward, down(silu(gate(x)) ⊙ up(x)) (arXiv 2002.05202)."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=arch.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        # The hidden width of the feed-forward is `intermediate_size`.  [B, T, intermediate]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerBlock(nn.Module):
    """Transformer block: attention and feed-forward, each behind a norm and beside a residual.

    With `recompute`, activations inside the block are computed again in the backward pass instead of stored.
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
        """Maps [B, T, D] to [B, T, D]."""
        if self.recompute and torch.is_grad_enabled():
            # Stores only the inputs of `run`, which the backward pass calls again (arXiv 1604.06174).
            return checkpoint(self.run, x, cos, sin, segments, use_reentrant=False)
        return self.run(x, cos, sin, segments)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, segments: list[Segment] | None) -> Tensor:
        """Computes `forward` without recomputation."""
        # x ← x + s · attention(norm(x)), then x ← x + s · feed_forward(norm(x)).  [B, T, D]
        x = x + scale(self.self_attn(self.input_layernorm(x), cos, sin, segments), self.residual_scale)
        return x + scale(self.mlp(self.post_attention_layernorm(x)), self.residual_scale)


class Decoder(nn.Module):
    """A causal language model: tokens to logits, or to the result of a function of hidden states and lm_head weight."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.embed_tokens = nn.Embedding(arch.vocab_rows, arch.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(arch, arch.window(layer)) for layer in range(arch.num_layers))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_rows, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes lm_head share the embedding's weight if the architecture ties them. `to_empty` undoes it."""
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
        """Returns logits [B, T, V], or with `head` the result of `head(hidden, weight)`.

        `hidden` is [B, T, D] and `weight` [vocab_rows, D]. Logits are hidden · weightᵀ over the first V rows. Hidden
        states include the architecture's scale of the logits already.

        The loss enters here as `head` because sharded data parallelism needs every use of the parameters
        inside the root module's forward.
        """
        # Angles and documents are the same for all blocks.  cos, sin [B, 1, T, d]
        cos, sin = rotary_angles(position_ids, self.arch.head_dim, self.arch.rope_theta, self.arch.rope_scaling)
        segments = document_segments(document_ids)
        # Embed, then run the blocks on the residual stream.  [B, T, D]
        x = scale(self.embed_tokens(tokens), self.arch.embedding_scale)
        for block in self.layers:
            x = block(x, cos, sin, segments)
        # logit_scale · (hidden · weightᵀ) = (logit_scale · hidden) · weightᵀ. Padding rows of the weight are no tokens.
        hidden = scale(self.norm(x), self.arch.logit_scale)
        return self.lm_head(hidden)[..., : self.arch.vocab_size] if head is None else head(hidden, self.lm_head.weight)


def meta_decoder(arch: Architecture) -> Decoder:
    """Returns a decoder on the meta device: names and shapes without memory.

    Raises:
        UsageError: the attention heads are no multiple of the key heads.
    """
    if arch.num_heads % arch.num_kv_heads:
        raise UsageError(f"{arch.num_heads} attention heads, {arch.num_kv_heads} of keys; wanted a multiple of them.")
    with torch.device("meta"):
        return Decoder(arch)


def allocate(model: Decoder, device: torch.device) -> Decoder:
    """Allocates the decoder's parameters on `device`, in float32, without filling them.

    Raises:
        UsageError: the machine has less memory than the parameters need.
    """
    # 4 bytes for each number of this process's parts of the parameters.
    local_parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    needed = sum(parameter.numel() for parameter in local_parameters) * 4
    if device.type == "cpu" and needed > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise UsageError(f"the student needs {needed / 2**30:.1f} GiB of memory, and {memory / 2**30:.1f} are there.")
    # `to_empty` gives tied parameters separate memory, so they are tied again.
    model = model.to_empty(device=device)
    model.tie()
    return model
