"""GLM-4 (arXiv 2406.12793): RoPE over half of each attention head, pairs of neighbouring channels. 0414: four norms.

Releases of 2025 (`glm4`) also norm the outputs of attention and feed-forward. Folders join gate and up.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kd_core.row_shares import PackedDocuments
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.kv_cache import LayerCache
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.decoder.transformer_block import TransformerBlock
from kd_core.students.families.family import GATE_UP, NO_PADDING, Config, Family, split_rotary_share
from kd_core.students.student import ShardingRule


class Glm4Block(TransformerBlock):
    """Transformer block with a norm before and one behind attention, and the feed-forward likewise."""

    sharding_rules: Mapping[str, ShardingRule] = {
        **TransformerBlock.sharding_rules,
        "post_self_attn_layernorm": "residual_norm",
        "post_mlp_layernorm": "residual_norm",
    }

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__(arch, layer)
        self.post_self_attn_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.post_mlp_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, documents: PackedDocuments | LayerCache) -> Tensor:
        """Computes `forward` without recomputation."""
        # x ← x + norm(attention(norm(x))), then x ← x + norm(feed_forward(norm(x))).  [B, T, D]
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, documents))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


def _flatten(config: Config) -> Config:
    return split_rotary_share(config, default=0.5)


def _read(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", True))
    return {"qkv_bias": bias, "rotary_share": config["rotary_share"], "rotary_pairs": "neighbours"}


def _write(arch: Architecture) -> Config:
    return {**NO_PADDING, "attention_bias": arch.qkv_bias, "partial_rotary_factor": arch.rotary_share}


GLM = Family(
    "GlmForCausalLM", _read, _write, head_dim=128, kv_heads=2, expects=(("mlp_bias", False),), flatten=_flatten,
    joined=(GATE_UP,),
)  # fmt: skip
GLM4 = replace(GLM, transformers_class="Glm4ForCausalLM", block=Glm4Block)
