"""One decoder for all families of `huggingface/config_json.py`: grouped-query attention, RoPE, RMSNorm, SwiGLU.

Parameter names are those of Hugging Face's Llama without the leading `model.`, so that weights need no map of names.
A decoder is built on the meta device, then allocated (`students/student.py`) and filled (`starts/`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_core.document_lengths import Documents
from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.attention import Attention
from kd_core.students.decoder.kv_cache import KeyValueCache, LayerCache
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.decoder.rope import rotary_angles
from kd_core.students.decoder.shared_cast import cast_once
from kd_core.students.student import ShardingRule, Student


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
        gate_x, up_x = cast_once(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(self.gate_proj(gate_x)) * self.up_proj(up_x))


class TransformerBlock(nn.Module):
    """Transformer block: attention and feed-forward, each behind a norm and beside a residual.

    `recompute` runs the block where activations are computed again in the backward pass instead of stored.
    """

    def __init__(self, arch: Architecture, window: int | None = None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.self_attn = Attention(arch, window)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.mlp = SwiGLU(arch)
        self.residual_scale = arch.residual_scale
        self.recompute: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | LayerCache) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        if self.recompute and torch.is_grad_enabled():
            return self.recompute(self.run, x, cos, sin, documents)
        return self.run(x, cos, sin, documents)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | LayerCache) -> Tensor:
        """Computes `forward` without recomputation."""
        # x ← x + s · attention(norm(x)), then x ← x + s · feed_forward(norm(x)).  [B, T, D]
        x = x + scale(self.self_attn(self.input_layernorm(x), cos, sin, documents), self.residual_scale)
        return x + scale(self.mlp(self.post_attention_layernorm(x)), self.residual_scale)


class Context(NamedTuple):
    """Angles of the positions, and the documents of packed rows or a cache of their earlier positions."""

    cos: Tensor
    sin: Tensor
    documents: Documents | KeyValueCache


class Decoder(Student):
    """A Llama-like decoder: RMSNorm before attention and before the feed-forward, a residual around each."""

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

    def sharding_rules(self) -> Mapping[str, ShardingRule]:
        return {
            "embed_tokens": "embedding",
            "norm": "norm",
            "lm_head": "lm_head",
            "input_layernorm": "norm",
            "post_attention_layernorm": "norm",
            "self_attn.q_proj": "columns",
            "self_attn.k_proj": "kv_columns",
            "self_attn.v_proj": "kv_columns",
            "self_attn.q_norm": "head_norm",
            "self_attn.k_norm": "head_norm",
            "self_attn.o_proj": "rows",
            "mlp.gate_proj": "columns",
            "mlp.up_proj": "columns",
            "mlp.down_proj": "rows",
        }

    def select_kv_heads(self, heads: slice) -> None:
        for block in self.layers:
            assert isinstance(block, TransformerBlock)
            block.self_attn.kv_head_slice = heads

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return scale(self.embed_tokens(tokens), self.arch.embedding_scale)

    def context(self, position_ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"] | Documents | None) -> Context:
        # Angles and documents are the same for all blocks.  cos, sin [B, 1, T, d]
        cos, sin = rotary_angles(position_ids, self.arch.head_dim, self.arch.rope_theta, self.arch.rope_scaling)
        if document_ids is None:
            return Context(cos, sin, Documents.one_a_row(position_ids))
        return Context(cos, sin, Documents.from_ids(document_ids) if isinstance(document_ids, Tensor) else document_ids)

    def packed_context(
        self, position_ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"], documents: Documents | None
    ) -> Context:
        return self.context(position_ids, document_ids if documents is None else documents)

    def new_cache(self, slots: int) -> KeyValueCache:
        return KeyValueCache(self.arch.num_layers, slots)

    def cached_context(self, position_ids: Int[Tensor, "B T"], cache: KeyValueCache) -> Context:
        cache.begin_pass(position_ids)
        return self.context(position_ids, None)._replace(documents=cache)

    def run_block(self, layer: int, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        cos, sin, documents = context
        of_layer = documents.by_layer[layer] if isinstance(documents, KeyValueCache) else documents
        return self.layers[layer](x, cos, sin, of_layer)

    def last_hidden(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        # logit_scale · (hidden · weightᵀ) = (logit_scale · hidden) · weightᵀ.
        return scale(self.norm(x), self.arch.logit_scale)


def meta_decoder(arch: Architecture) -> Decoder:
    """Returns a decoder on the meta device: names and shapes without memory.

    Raises:
        UsageError: the attention heads are no multiple of the key heads.
    """
    if arch.num_heads % arch.num_kv_heads:
        raise UsageError(f"{arch.num_heads} attention heads, {arch.num_kv_heads} of keys; wanted a multiple of them.")
    with torch.device("meta"):
        return Decoder(arch)
