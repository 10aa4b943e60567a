"""Llama (arXiv 2407.21783): RMSNorm before attention and feed-forward, RoPE, grouped queries, SwiGLU."""

from typing import Any

from kd_core.students.decoder.architecture import Architecture
from kd_core.students.families.family import Config, Family, read_attention_bias


def read_llama(config: Config) -> dict[str, Any]:
    """Returns the biases."""
    return {**read_attention_bias(config), "mlp_bias": bool(config.get("mlp_bias", False))}


def write_llama(arch: Architecture) -> Config:
    """Returns the fields of biases."""
    return {"attention_bias": arch.qkv_bias, "mlp_bias": arch.mlp_bias}


LLAMA = Family("LlamaForCausalLM", read_llama, write_llama, divided_by_heads=True)
