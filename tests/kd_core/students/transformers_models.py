"""Small random models of families that our own decoder lacks, made by transformers, and their folders."""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
# Class name and settings of each family. The state of `STATEFUL` ones runs across positions.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma 3": (
        "Gemma3Text",
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 2.0},
    ),
    "gemma 2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 8}),
    "phi 3": ("Phi3", {}),
    "glm 4": ("Glm4", {}),
    "olmo 2": ("Olmo2", {}),
    "smollm 3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "qwen 3 moe": ("Qwen3Moe", {**EXPERTS, "router_aux_loss_coef": 0.01}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "num_hidden_layers": 2},
    ),
    "deepseek 3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
            "first_k_dense_replace": 1, "head_dim": 4, "num_key_value_heads": 4,
        },
    ),
    "qwen 3 next": ("Qwen3Next", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16}),
    "qwen 3.5": ("Qwen3_5Text", {**LINEAR}),
    "nemotron h": (
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
            "n_groups": 2, "chunk_size": 8, "expand": 1, "num_hidden_layers": 2,
        },
    ),
    "granite 4": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
            "mamba_chunk_size": 8, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
            "attention_multiplier": 0.3, "num_local_experts": 4, "num_experts_per_tok": 2, "mamba_n_groups": 1,
            "shared_intermediate_size": 16,
        },
    ),
    "lfm 2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
}  # fmt: skip
STATEFUL = ("qwen 3 next", "qwen 3.5", "nemotron h", "granite 4", "lfm 2")


def their_model(name: str, **changes: Any) -> Any:
    """A random model; norms and biases are random too, so that leaving one out shows."""
    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings, **changes})
    torch.manual_seed(1)
    return randomise(transformers.AutoModelForCausalLM.from_config(config).eval())


@torch.no_grad()
def randomise(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "A_log" not in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(model: Any, folder: Path) -> Path:
    """The folder of a model, as transformers writes it."""
    model.save_pretrained(folder)
    return folder


def save_folder(name: str, folder: Path, **changes: Any) -> Path:
    return save(their_model(name, **changes), folder)
