"""Conversion of Hugging Face's `config.json` to an `Architecture` and back. A new family is an entry in `FAMILIES`.

Missing fields have the defaults of transformers. Unsupported fields that would change the arithmetic are errors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, read_json
from kd_core.students.decoder.architecture import UPPER_BOUNDS, Architecture
from kd_core.students.decoder.rope import rotary_angles
from kd_core.students.huggingface.rope_config import read_rope, rope_fields

Config = dict[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"


def _attention_bias(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias}


def _llama(config: Config) -> dict[str, Any]:
    return {**_attention_bias(config), "mlp_bias": bool(config.get("mlp_bias", False))}


def _granite(config: Config) -> dict[str, Any]:
    # Granite divides its logits, so `logit_scale` is the inverse of `logits_scaling`.
    return {
        **_llama(config),
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "attention_scale": float(config.get("attention_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / float(config.get("logits_scaling", 1.0)),
    }


def _mistral(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window", 4096)
    return {"windows": None if window is None else (int(window),) * int(config["num_hidden_layers"])}


def _qwen_windows(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    # Layers from `max_window_layers` on have the window, unless `layer_types` lists the kind of each layer.
    layers, first = int(config["num_hidden_layers"]), int(config.get("max_window_layers", 28))
    kinds: list[str] = config.get("layer_types") or [SLIDING if layer >= first else FULL for layer in range(layers)]
    if window is None or SLIDING not in kinds:
        return {"windows": None}
    return {"windows": tuple(int(window) if kind == SLIDING else None for kind in kinds)}


def _qwen2(config: Config) -> dict[str, Any]:
    return {"qkv_bias": True, **_qwen_windows(config)}


def _qwen3(config: Config) -> dict[str, Any]:
    return {"qk_norm": True, **_attention_bias(config), **_qwen_windows(config)}


def _write_llama(arch: Architecture) -> Config:
    return {"attention_bias": arch.qkv_bias, "mlp_bias": arch.mlp_bias}


def _write_granite(arch: Architecture) -> Config:
    return {
        **_write_llama(arch),
        "embedding_multiplier": arch.embedding_scale,
        "attention_multiplier": arch.head_dim**-0.5 if arch.attention_scale is None else arch.attention_scale,
        "residual_multiplier": arch.residual_scale,
        "logits_scaling": 1.0 / arch.logit_scale,
    }


def _write_mistral(arch: Architecture) -> Config:
    return {"sliding_window": arch.window(0)}


def _write_qwen(arch: Architecture) -> Config:
    windows = arch.windows or (None,) * arch.num_layers
    sizes = {window for window in windows if window is not None}
    return {
        "attention_bias": arch.qkv_bias,
        "use_sliding_window": bool(sizes),
        "sliding_window": max(sizes, default=None),
        "max_window_layers": arch.num_layers,
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


@dataclass(frozen=True)
class Family:
    """A `model_type`: its fields of arithmetic, its defaults, and its limits.

    Args:
        transformers_class: the class in `architectures`.
        read: returns arguments of `Architecture` from a configuration.
        write: returns fields of a configuration from an architecture.
        head_dim: default size of an attention head. None: hidden size over attention heads.
        kv_heads: default number of key and value heads. None: that of attention heads.
        expects: fields that are supported with this one value only.
    """

    transformers_class: str
    read: Callable[[Config], dict[str, Any]]
    write: Callable[[Architecture], Config]
    head_dim: int | None = None
    kv_heads: int | None = None
    expects: tuple[tuple[str, Any], ...] = ()


NO_BIAS = (("attention_bias", False), ("mlp_bias", False))
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, _write_llama),
    "mistral": Family(
        "MistralForCausalLM", _mistral, _write_mistral, kv_heads=8, expects=(*NO_BIAS, ("layer_types", None))
    ),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _write_qwen, kv_heads=32, expects=(("mlp_bias", False),)),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _write_qwen, head_dim=128, kv_heads=32, expects=(("mlp_bias", False),)),
    "granite": Family("GraniteForCausalLM", _granite, _write_granite),
}
EXPECTED_IN_ALL = (("hidden_act", "silu"), ("quantization_config", None), ("transformers_weights", None))


def _supported_family(path: Path, config: Config) -> Family:
    """Returns the family of a configuration, and checks that no unsupported field would change the arithmetic."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UsageError(f"{path}: model_type is {name!r}; wanted one of {sorted(FAMILIES)}.")
    family = FAMILIES[name]
    for field, value in (*EXPECTED_IN_ALL, *family.expects):
        if config.get(field, value) != value:
            raise UsageError(f"{path}: {field} is {config[field]!r}; only {value!r} is supported for {name}.")
    layers = config.get("num_hidden_layers", 1)  # checked before anything is built per layer
    if type(layers) is not int or not 1 <= layers <= UPPER_BOUNDS["num_layers"]:
        raise UsageError(f"{path}: num_hidden_layers is {layers!a}; wanted 1 to {UPPER_BOUNDS['num_layers']}.")
    kinds = config.get("layer_types")
    if kinds is not None and (len(kinds) != config.get("num_hidden_layers") or not set(kinds) <= {SLIDING, FULL}):
        raise UsageError(f"{path}: layer_types is {kinds}; wanted {SLIDING} or {FULL} for each layer.")
    return family


def parse_architecture(path: Path, config: Config) -> Architecture:
    """Returns the architecture of a configuration. `path` names it in errors.

    Raises:
        UsageError: a field is missing, or the family or a setting is not supported.
    """
    family = _supported_family(path, config)
    try:
        heads = int(config["num_attention_heads"])
        theta, scaling = read_rope(path, config)
        return Architecture(
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads", family.kv_heads) or heads),
            head_dim=int(config.get("head_dim") or family.head_dim or config["hidden_size"] // heads),
            rope_theta=theta,
            norm_eps=float(config["rms_norm_eps"]),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_positions=int(config["max_position_embeddings"]),
            rope_scaling=scaling,
            family=str(config["model_type"]),
            **family.read(config),
        )
    except KeyError as error:
        raise UsageError(f"{path}: field {error} is missing.") from None


def read_architecture(folder: Path) -> Architecture:
    """Returns the architecture of a Hugging Face folder.

    Raises:
        UsageError: there is no `config.json`, a field is missing, or the family or a setting is not supported.
    """
    path, expected = folder / "config.json", "a Hugging Face model configuration"
    with damage_as_usage_error(path, expected, "Fetch the folder again"):
        arch = parse_architecture(path, read_json(path, expected))
        if arch.head_dim % 2:
            raise ValueError(f"heads of {arch.head_dim} channels")
        angles = rotary_angles(torch.zeros(1, 1, dtype=torch.int64), arch.head_dim, arch.rope_theta, arch.rope_scaling)
        if not all(values.isfinite().all() for values in angles):
            raise ValueError("angles of RoPE that are not finite")
        return arch


def _is_described_by(arch: Architecture, config: Config) -> bool:
    """Checks that reading the configuration gives the architecture back, as a family lacks settings of other ones."""
    read_back: dict[str, Any] = {**vars(parse_architecture(Path("config.json"), config))}
    # These settings have no field of their own: a file counts all rows, and Granite always states an attention scale.
    changes: dict[str, Any] = {"vocab_size": arch.vocab_rows, "padded_vocab_size": None}
    if arch.family == "granite" and arch.attention_scale is None:
        changes["attention_scale"] = read_back["attention_scale"]
    expected: dict[str, Any] = {**vars(arch), **changes}
    floats = [name for name, value in expected.items() if isinstance(value, float)]
    are_close = all(math.isclose(read_back.pop(name), expected.pop(name), rel_tol=1e-9) for name in floats)
    return are_close and read_back == expected


def config_fields(arch: Architecture, bos: int | None, eos: int | list[int] | None, dtype: str = "float32") -> Config:
    """Returns the `config.json` of an architecture, as transformers reads it. `dtype` is the type of its weights."""
    family = FAMILIES[arch.family]
    config = {
        "architectures": [family.transformers_class],
        "model_type": arch.family,
        "vocab_size": arch.vocab_rows,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "max_position_embeddings": arch.max_positions,
        "hidden_act": "silu",
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
        **rope_fields(arch.rope_theta, arch.rope_scaling),
        **family.write(arch),
    }
    assert _is_described_by(arch, config), f"{arch.family} does not have these settings: {arch}"
    return config
