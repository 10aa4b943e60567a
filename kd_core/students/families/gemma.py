"""Gemma 2 (arXiv 2408.00118) and Gemma 3 (arXiv 2503.19786), the text model also out of image and text models.

Both norm the input and the output of attention and of the feed-forward, by 1 + weight, and multiply embeddings by √D.
Gemma 2 alternates layers with a window and layers without one, and caps the products of attention and the logits.
Gemma 3 caps nothing: it norms queries and keys. Five layers have a window for each one that has none, and a theta of
their own. Linear scaling stretches the positions of the others.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.row_shares import PackedDocuments
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.kv_cache import LayerCache
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.decoder.transformer_block import SwiGLU, TransformerBlock
from kd_core.students.families.family import (
    FULL,
    SLIDING,
    Config,
    Family,
    read_attention_bias,
    read_windows,
    split_ropes_by_kind,
    write_windows,
)
from kd_core.students.student import ShardingRule

ACTIVATION = "gelu_pytorch_tanh"
# Defaults of transformers. Files of Gemma 3 name few fields of its text model.
GEMMA_2: Config = {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192, "hidden_activation": ACTIVATION, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "sliding_window_pattern": 2, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}  # fmt: skip
GEMMA_3: Config = {
    **GEMMA_2, "vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6,
    "final_logit_softcapping": None, "attn_logit_softcapping": None,
}  # fmt: skip
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4


class GeGLU(SwiGLU):
    """Gated feed-forward with GELU, by its approximation with tanh (arXiv 2002.05202)."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        """Returns the gate's factor of each channel."""
        return F.gelu(x, approximate="tanh")


class GemmaBlock(TransformerBlock):
    """Transformer block with norms before and behind attention and feed-forward, inside the residual."""

    sharding_rules: Mapping[str, ShardingRule] = {
        **TransformerBlock.sharding_rules,
        "post_attention_layernorm": "residual_norm",
        "pre_feedforward_layernorm": "norm",
        "post_feedforward_layernorm": "residual_norm",
    }

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__(arch, layer)
        self.mlp = GeGLU(arch)
        self.pre_feedforward_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps, arch.norm_offset)
        self.post_feedforward_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps, arch.norm_offset)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, documents: PackedDocuments | LayerCache) -> Tensor:
        # x ← x + norm(attention(norm(x))), then x ← x + norm(feed_forward(norm(x))).  [B, T, D]
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, documents))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def _soft_cap(config: Config, field: str) -> float | None:
    return None if config[field] is None else float(config[field])


def _read_gemma2(config: Config) -> dict[str, Any]:
    # The last layer of every `sliding_window_pattern` ones has no window, unless `layer_types` lists all kinds.
    period, layers = int(config["sliding_window_pattern"]), range(1, int(config["num_hidden_layers"]) + 1)
    kinds = config.get("layer_types") or [SLIDING if layer % period else FULL for layer in layers]
    scalar = float(config["query_pre_attn_scalar"])
    if not (scalar >= 1 and scalar.is_integer()):
        raise UsageError(f"query_pre_attn_scalar is {scalar}; wanted a whole number from 1.")
    return {
        **read_attention_bias(config),
        "windows": read_windows(kinds, config["sliding_window"]),
        "root_scaled_embedding": True,
        "norm_offset": 1.0,
        # Queries are divided by √scalar, and the scalar is the size of a head in most models.
        "attention_scale": None if scalar == config["head_dim"] else scalar**-0.5,
        "attention_soft_cap": _soft_cap(config, "attn_logit_softcapping"),
        "logit_soft_cap": _soft_cap(config, "final_logit_softcapping"),
    }


def _read_gemma3(config: Config) -> dict[str, Any]:
    return {**_read_gemma2(config), "qk_norm": True, "local_rope_theta": config["local_rope_theta"]}


def _write_gemma2(arch: Architecture) -> Config:
    kinds, window = write_windows(arch)
    return {
        "attention_bias": arch.qkv_bias,
        "hidden_act": ACTIVATION,
        "hidden_activation": ACTIVATION,
        "query_pre_attn_scalar": arch.head_dim if arch.attention_scale is None else round(arch.attention_scale**-2),
        "layer_types": kinds,
        # transformers wants a window even where no layer has one.
        "sliding_window": window or GEMMA_2["sliding_window"],
        "attn_logit_softcapping": arch.attention_soft_cap,
        "final_logit_softcapping": arch.logit_soft_cap,
    }


def _write_gemma3(arch: Architecture) -> Config:
    return {**_write_gemma2(arch), "rope_local_base_freq": arch.local_rope_theta}


def _complete(config: Config, defaults: Config) -> Config:
    """Adds defaults, and leaves out the older name of the activation, which transformers does not read."""
    config = {**defaults, **config, "use_bidirectional_attention": bool(config.get("use_bidirectional_attention"))}
    return {name: value for name, value in config.items() if name != "hidden_act"}


def _flatten_gemma2(config: Config) -> Config:
    config = _complete(config, GEMMA_2)
    if config["sliding_window_pattern"] != GEMMA_2["sliding_window_pattern"] and not config.get("layer_types"):
        raise UsageError(
            f"sliding_window_pattern is {config['sliding_window_pattern']}, which transformers ignores for Gemma 2. "
            "State layer_types instead."
        )
    return config


def _flatten_gemma3(config: Config) -> Config:
    config = _complete(config, GEMMA_3)
    return split_ropes_by_kind(config, GLOBAL_THETA, config.get("rope_local_base_freq", LOCAL_THETA))


def _flatten_text_model(config: Config) -> Config:
    """Takes the text model of an image and text model, with what counts for the whole folder."""
    shared = {name: config[name] for name in ("quantization_config", "transformers_weights") if name in config}
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
    # transformers caps no logits of a model with images.
    uncapped = {"model_type": "gemma3_text", "final_logit_softcapping": None}
    return _flatten_gemma3({**tied, **config["text_config"], **shared, **uncapped})


EXPECTED = (("hidden_activation", ACTIVATION), ("use_bidirectional_attention", False))
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    _read_gemma2,
    _write_gemma2,
    tie_embeddings=True,
    expects=EXPECTED,
    flatten=_flatten_gemma2,
    block=GemmaBlock,
    divided_by_heads=True,
)
GEMMA3_TEXT = replace(
    GEMMA2,
    transformers_class="Gemma3ForCausalLM",
    read=_read_gemma3,
    write=_write_gemma3,
    expects=(*EXPECTED, ("attn_logit_softcapping", None)),
    flatten=_flatten_gemma3,
    # Names in an image and text model: of transformers 4, and of its first versions with Gemma 3.
    prefixes=("model.", "language_model.model.", "model.language_model.", "language_model."),
    ignored=tuple(
        f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
    ),
)
GEMMA3 = replace(GEMMA3_TEXT, flatten=_flatten_text_model)
