"""The transformer block that most families share: grouped-query attention and SwiGLU, each behind an RMSNorm.

A family of other wiring has a block of its own in `families/`, which takes an architecture and the number of its layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_core.row_shares import PackedDocuments
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.attention import Attention
from kd_core.students.decoder.kv_cache import LayerCache
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.decoder.shared_cast import cast_once
from kd_core.students.student import ShardingRule


def scale(x: Tensor, by: float) -> Tensor:
    """Returns `x · by`, without a pass over `x` if `by` is 1."""
    return x if by == 1 else x * by


class SwiGLU(nn.Module):
    """Gated feed-forward, down(silu(gate(x)) ⊙ up(x)) (arXiv 2002.05202)."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        """Returns the gate's factor of each channel."""
        return F.silu(x)

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=arch.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        # The hidden width of the feed-forward is `intermediate_size`.  [B, T, intermediate]
        gate_x, up_x = cast_once(x, self.gate_proj, self.up_proj)
        return self.down_proj(self.activation(self.gate_proj(gate_x)) * self.up_proj(up_x))


class TransformerBlock(nn.Module):
    """Transformer block: attention and feed-forward, each behind a norm and beside a residual.

    `recompute` runs the block where activations are computed again in the backward pass instead of stored.
    """

    # By name inside the block, those of norms and biases that an architecture lacks included.
    sharding_rules: Mapping[str, ShardingRule] = {
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
        "self_attn.q_proj": "columns",
        "self_attn.k_proj": "kv_columns",
        "self_attn.v_proj": "kv_columns",
        "self_attn.q_norm": "head_norm",
        "self_attn.k_norm": "head_norm",
        "self_attn.sinks": "head_values",
        "self_attn.o_proj": "rows",
        "mlp.gate_proj": "columns",
        "mlp.up_proj": "columns",
        "mlp.down_proj": "rows",
    }

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps, arch.norm_offset)
        self.self_attn = Attention(arch, layer)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps, arch.norm_offset)
        self.mlp = SwiGLU(arch)
        self.residual_scale = arch.residual_scale
        self.recompute: Callable[..., Any] | None = None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, documents: PackedDocuments | LayerCache
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Maps [B, T, D] to [B, T, D], and returns values for `Context.block_values` beside it if the block has any."""
        if self.recompute and torch.is_grad_enabled():
            return self.recompute(self.run, x, cos, sin, documents)
        return self.run(x, cos, sin, documents)

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, documents: PackedDocuments | LayerCache
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes `forward` without recomputation."""
        # x ← x + s · attention(norm(x)), then x ← x + s · feed_forward(norm(x)).  [B, T, D]
        x = x + scale(self.self_attn(self.input_layernorm(x), cos, sin, documents), self.residual_scale)
        return x + scale(self.mlp(self.post_attention_layernorm(x)), self.residual_scale)
