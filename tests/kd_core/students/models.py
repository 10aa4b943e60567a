"""Small random models made by transformers, and their folders; rows of tokens to compare logits on."""

from pathlib import Path
from typing import Any

import torch
import transformers

from kd_core.students.decoder.decoder import Decoder
from kd_core.students.starts.start import Pretrained, build_student

CPU = torch.device("cpu")
VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Every family, with each of its settings that changes arithmetic at work.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, with biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama, wide heads, theta": ("Llama", {"head_dim": 12, "rope_parameters": {"rope_theta": 5e5}}),
    "llama, one key head": ("Llama", {"num_key_value_heads": 1}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama 3": (
        "Llama",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e3, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama, yarn": ("Llama", {"head_dim": 16, "rope_parameters": YARN}),
    "llama, yarn, not rounded": (
        "Llama", {"head_dim": 16, "rope_parameters": {**YARN, "truncate": False, "beta_fast": 8.0, "beta_slow": 0.5}},
    ),
    "llama, yarn, mscale": (
        "Llama", {"head_dim": 16, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, layer types": (
        "Qwen3",
        {
            "head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "logits_scaling": 7.0},
    ),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
         "swiglu_limit": 7.0, "num_hidden_layers": 4,
         "rope_parameters": {**YARN, "truncate": False, "beta_fast": 8.0, "beta_slow": 0.5}},
    ),
    "gpt-oss, no windows": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 4, "num_hidden_layers": 2,
         "layer_types": ["full_attention"] * 2, "attention_bias": False},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6}),
    "qwen3 moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
         "norm_topk_prob": True},
    ),
    "qwen3 moe, dense layers": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "mlp_only_layers": [0], "attention_bias": True, "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen3 moe, every second": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "decoder_sparse_step": 2},
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma2, no caps, own scale, biases": (
        "Gemma2",
        {
            "head_dim": 12, "query_pre_attn_scalar": 7, "sliding_window": 5, "attn_logit_softcapping": None,
            "final_logit_softcapping": None, "attention_bias": True, "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 7, "final_logit_softcapping": 5.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "gemma3, six layers": ("Gemma3", {"head_dim": 16, "sliding_window": 5, "num_hidden_layers": 6}),
}  # fmt: skip


def their_model(name: str, **changes: Any) -> Any:
    """A random model of transformers; norms and biases are random too, so that leaving one out shows."""
    family, settings = FAMILIES[name]
    kind = "Gemma3Text" if family == "Gemma3" else family
    # An embedding of padding has no gradient there.
    settings = {"pad_token_id": None, **settings} if "Gemma" in family else settings
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings, **changes})
    torch.manual_seed(1)
    # `eager` attention computes in float32 what sdpa does; masks are theirs.
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def load(folder: Path) -> Decoder:
    """A folder as our decoder."""
    return build_student(Pretrained(str(folder)), CPU, seed=0).eval()


def rows(B: int = 2, T: int = 40, vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and document ids of rows that are one document each."""
    tokens = torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(T).expand(B, T), torch.zeros(B, T, dtype=torch.int64)


@torch.no_grad()
def difference(ours: Decoder, theirs: Any) -> float:
    """The largest difference of logits, on rows longer than any window and than the original context."""
    tokens, positions, documents = rows()
    return float((ours(tokens, positions, documents) - theirs(tokens).logits).abs().max())
