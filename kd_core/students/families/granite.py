"""Granite 3 (IBM): Llama with factors on embeddings, attention, residuals and logits, after µP (arXiv 2203.03466)."""

from typing import Any

from kd_core.students.decoder.architecture import Architecture
from kd_core.students.families.family import Config, Family
from kd_core.students.families.llama import read_llama, write_llama


def _read(config: Config) -> dict[str, Any]:
    # Granite divides its logits, so `logit_scale` is the inverse of `logits_scaling`.
    return {
        **read_llama(config),
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "attention_scale": float(config.get("attention_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / float(config.get("logits_scaling", 1.0)),
    }


def _write(arch: Architecture) -> Config:
    return {
        **write_llama(arch),
        "embedding_multiplier": arch.embedding_scale,
        "attention_multiplier": arch.head_dim**-0.5 if arch.attention_scale is None else arch.attention_scale,
        "residual_multiplier": arch.residual_scale,
        "logits_scaling": 1.0 / arch.logit_scale,
    }


GRANITE = Family("GraniteForCausalLM", _read, _write)
