"""Hugging Face `config.json` to `Architecture` and back. A new family is one more entry in `FAMILIES`."""

from pathlib import Path
from typing import Any

from kd_core.errors import UsageError
from kd_core.files import read_json
from kd_core.students.decoder import Architecture

FAMILIES = {"llama": "LlamaForCausalLM", "granite": "GraniteForCausalLM"}


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    """Settings that would silently change the arithmetic are refused by name."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UsageError(f"{path}: model_type is {family!r}; wanted one of {sorted(FAMILIES)}.")
    wanted = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_scaling": None}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise UsageError(f"{path}: {name} is {config[name]!r}; only {value!r} is supported.")


def _scales(config: dict[str, Any]) -> dict[str, Any]:
    """What a Granite multiplies by; it divides its logits."""
    if config["model_type"] != "granite":
        return {}
    return {
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "attention_scale": float(config.get("attention_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / float(config.get("logits_scaling", 1.0)),
    }


def _multipliers(arch: Architecture) -> dict[str, Any]:
    """The family that has what an architecture multiplies by, and its fields for them."""
    found = {
        "embedding_multiplier": arch.embedding_scale,
        "residual_multiplier": arch.residual_scale,
        "logits_scaling": 1.0 / arch.logit_scale,
    }
    if arch.attention_scale is None and set(found.values()) == {1.0}:
        return {"architectures": [FAMILIES["llama"]], "model_type": "llama"}
    scale = arch.head_dim**-0.5 if arch.attention_scale is None else arch.attention_scale
    return {"architectures": [FAMILIES["granite"]], "model_type": "granite", "attention_multiplier": scale, **found}


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a Hugging Face folder.

    Raises:
        UsageError: no `config.json`, a field missing, or a family or setting that we do not have.
    """
    path = folder / "config.json"
    config = read_json(path, "a Hugging Face model configuration")
    _refuse_unsupported(path, config)
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UsageError(f"{path}: rope_type is {rope['rope_type']!r}; only 'default' is supported.")
    try:
        heads = int(config["num_attention_heads"])
        return Architecture(
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            norm_eps=float(config["rms_norm_eps"]),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_positions=int(config["max_position_embeddings"]),
            **_scales(config),
        )
    except KeyError as error:
        raise UsageError(f"{path}: field {error} is missing.") from None


def config_of(arch: Architecture, bos: int | None, eos: int | None) -> dict[str, Any]:
    """The `config.json` of an architecture, as transformers reads it."""
    return {
        **_multipliers(arch),
        "vocab_size": arch.vocab_rows,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "rope_theta": arch.rope_theta,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "max_position_embeddings": arch.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
