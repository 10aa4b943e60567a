"""Qwen 3 with experts (arXiv 2505.09388): Qwen 3 whose feed-forwards are mixtures of experts, in all or some layers."""

from typing import Any

from kd_core.students.decoder.architecture import Architecture, ExpertSettings
from kd_core.students.decoder.experts import ExpertBlock
from kd_core.students.families.family import Config, Family, Joined, Stacked, read_attention_bias, read_expert_count

EXPERT = "mlp.experts.{}"


def _read(config: Config) -> dict[str, Any]:
    every, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or ()
    layers = range(int(config["num_hidden_layers"]))
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    return {
        "qk_norm": True,
        **read_attention_bias(config),
        "windows": None if window is None else (int(window),) * len(layers),
        "experts": ExpertSettings(
            count=read_expert_count(config, 128),
            per_token=int(config.get("num_experts_per_tok", 8)),
            size=int(config.get("moe_intermediate_size", 768)),
            normalised=bool(config.get("norm_topk_prob", False)),
        ),
        # Every n-th layer has experts, unless it is listed as dense.
        "dense_layers": tuple(layer for layer in layers if layer in dense or (layer + 1) % every),
    }


def _write(arch: Architecture) -> Config:
    assert arch.experts is not None
    return {
        "attention_bias": arch.qkv_bias,
        "use_sliding_window": arch.window(0) is not None,
        "sliding_window": arch.window(0),
        "num_experts": arch.experts.count,
        "num_experts_per_tok": arch.experts.per_token,
        "moe_intermediate_size": arch.experts.size or arch.intermediate_size,
        "norm_topk_prob": arch.experts.normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(arch.dense_layers),
    }


QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    _read,
    _write,
    kv_heads=4,
    expects=(("mlp_bias", False), ("layer_types", None)),
    block=ExpertBlock,
    joined=(Joined("mlp.gate", ("mlp.router",)),),
    stacked=(
        Stacked("mlp.experts.gate_up_proj", (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight")),
        Stacked("mlp.experts.down_proj", (f"{EXPERT}.down_proj.weight",)),
    ),
)
