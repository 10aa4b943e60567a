"""OLMo 2 (arXiv 2501.00656): norms behind attention and feed-forward, and of whole queries and keys. OLMo 3: windows.

OLMo 3 (Ai2, 2025) has a window in three of four layers. Layers with a window do not scale RoPE.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kd_core.errors import UsageError
from kd_core.row_shares import PackedDocuments
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.attention import Attention
from kd_core.students.decoder.kv_cache import LayerCache
from kd_core.students.decoder.norm import ProjectionNorm, RMSNorm
from kd_core.students.decoder.transformer_block import TransformerBlock
from kd_core.students.families.family import (
    FULL,
    NO_PADDING,
    SLIDING,
    Config,
    Family,
    read_attention_bias,
    read_windows,
    split_ropes_by_kind,
    write_windows,
)
from kd_core.students.student import ShardingRule

WINDOW, THETA = 4096, 5e5  # OLMo 3's defaults


class Olmo2Attention(Attention):
    """Attention that norms queries and keys over all heads at once."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__(arch, layer)
        self.q_norm = ProjectionNorm(arch.num_heads * arch.head_dim, arch.norm_eps)
        self.k_norm = ProjectionNorm(arch.num_kv_heads * arch.head_dim, arch.norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of [B, T, D], the first two behind their norms."""
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v

    def norm_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class Olmo2Block(TransformerBlock):
    """Transformer block with norms behind attention and feed-forward, and none before."""

    sharding_rules: Mapping[str, ShardingRule] = {
        **TransformerBlock.sharding_rules,
        "attention_input": "norm",
        "mlp_input": "norm",
        "post_attention_layernorm": "residual_norm",
        "post_feedforward_layernorm": "residual_norm",
        "self_attn.k_proj": "normed_kv_columns",
        "self_attn.q_norm": "columns_norm",
        "self_attn.k_norm": "kv_columns_norm",
    }

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__(arch, layer)
        del self.input_layernorm
        self.self_attn = Olmo2Attention(arch, layer)
        self.post_feedforward_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)
        # Under sequence parallelism positions are gathered here, as a norm does in other families.
        self.attention_input, self.mlp_input = nn.Identity(), nn.Identity()

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, documents: PackedDocuments | LayerCache) -> Tensor:
        """Computes `forward` without recomputation."""
        # x ← x + norm(attention(x)), then x ← x + norm(feed_forward(x)).  [B, T, D]
        x = x + self.post_attention_layernorm(self.self_attn(self.attention_input(x), cos, sin, documents))
        return x + self.post_feedforward_layernorm(self.mlp(self.mlp_input(x)))


def _read_olmo2(config: Config) -> dict[str, Any]:
    return {"qk_norm": True, **read_attention_bias(config)}


def _write_olmo2(arch: Architecture) -> Config:
    return {**NO_PADDING, "attention_bias": arch.qkv_bias}


def _flatten_olmo3(config: Config) -> Config:
    theta, by_kind = config.get("rope_theta", THETA), config.get("rope_parameters") or {}
    if theta != THETA and "rope_theta" not in (by_kind.get(SLIDING) or {}):
        raise UsageError(
            f"rope_theta is {theta}, which transformers 5 takes for layers without a window alone. State it in "
            f"rope_parameters, for {FULL} and for {SLIDING}."
        )
    return split_ropes_by_kind(config, theta, THETA)


def _read_olmo3(config: Config) -> dict[str, Any]:
    layers = range(int(config["num_hidden_layers"]))
    kinds = config.get("layer_types") or [FULL if layer % 4 == 3 else SLIDING for layer in layers]
    windows = read_windows(kinds, config.get("sliding_window", WINDOW))
    return {**_read_olmo2(config), "windows": windows, "local_rope_theta": config["local_rope_theta"]}


def _write_olmo3(arch: Architecture) -> Config:
    # The scaling of full layers is a field that all families share.
    thetas = {FULL: arch.rope_theta, SLIDING: arch.local_rope_theta}
    ropes = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}
    kinds, window = write_windows(arch)
    # transformers makes the mask of windows, and asks for their size, also where no layer has one.
    return {**_write_olmo2(arch), "layer_types": kinds, "sliding_window": window or WINDOW, "rope_parameters": ropes}


OLMO2 = Family("Olmo2ForCausalLM", _read_olmo2, _write_olmo2, expects=(("mlp_bias", False),), block=Olmo2Block)
OLMO3 = replace(
    OLMO2, transformers_class="Olmo3ForCausalLM", read=_read_olmo3, write=_write_olmo3, flatten=_flatten_olmo3
)
