"""Hugging Face `config.json` to `Architecture` and back. A new family is one more entry in `FAMILIES`.

What a file leaves out counts as in transformers. What would change the arithmetic and is not ours is refused by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_core.errors import UsageError
from kd_core.files import damaged, read_json
from kd_core.students.decoder.architecture import MOST, Architecture
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
    """A Granite divides its logits."""
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
    found = {window for window in windows if window is not None}
    return {
        "attention_bias": arch.qkv_bias,
        "use_sliding_window": bool(found),
        "sliding_window": max(found, default=None),
        "max_window_layers": arch.num_layers,
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


@dataclass(frozen=True)
class Family:
    """How a `model_type` states its arithmetic. `head_dim` and `kv_heads`: where the file leaves them out; None: as
    many key heads as heads, and hidden size over heads. `expects`: fields that we have with this one value alone."""

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
EVERYWHERE = (("hidden_act", "silu"), ("quantization_config", None), ("transformers_weights", None))


def _family(path: Path, config: Config) -> Family:
    """The family of a configuration, once nothing in it would silently change the arithmetic."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UsageError(f"{path}: model_type is {name!r}; wanted one of {sorted(FAMILIES)}.")
    family = FAMILIES[name]
    for field, value in (*EVERYWHERE, *family.expects):
        if config.get(field, value) != value:
            raise UsageError(f"{path}: {field} is {config[field]!r}; only {value!r} is supported for {name}.")
    layers = config.get("num_hidden_layers", 1)  # before anything is made for each of them
    if type(layers) is not int or not 1 <= layers <= MOST["num_layers"]:
        raise UsageError(f"{path}: num_hidden_layers is {layers!a}; wanted 1 to {MOST['num_layers']}.")
    kinds = config.get("layer_types")
    if kinds is not None and (len(kinds) != config.get("num_hidden_layers") or not set(kinds) <= {SLIDING, FULL}):
        raise UsageError(f"{path}: layer_types is {kinds}; wanted {SLIDING} or {FULL} for each layer.")
    return family


def architecture_of(path: Path, config: Config) -> Architecture:
    """The architecture of a configuration; `path` names it in errors, which are those of `read_architecture`."""
    family = _family(path, config)
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
    """The architecture of a Hugging Face folder.

    Raises:
        UsageError: no `config.json`, a field missing, or a family or setting that we do not have.
    """
    path, what = folder / "config.json", "a Hugging Face model configuration"
    with damaged(path, what, "Fetch the folder again"):
        arch = architecture_of(path, read_json(path, what))
        if arch.head_dim % 2:
            raise ValueError(f"heads of {arch.head_dim} channels")
        angles = rotary_angles(torch.zeros(1, 1, dtype=torch.int64), arch.head_dim, arch.rope_theta, arch.rope_scaling)
        if not all(each.isfinite().all() for each in angles):
            raise ValueError("angles of RoPE that are not finite")
        return arch


def _is_said(arch: Architecture, config: Config) -> bool:
    """Whether the configuration means the architecture: a family cannot say every setting of another one."""
    said: dict[str, Any] = {**vars(architecture_of(Path("config.json"), config))}
    rows: dict[str, Any] = {"vocab_size": arch.vocab_rows, "padded_vocab_size": None}
    if arch.family == "granite" and arch.attention_scale is None:
        rows["attention_scale"] = said["attention_scale"]
    wanted: dict[str, Any] = {**vars(arch), **rows}
    floats = [name for name, value in wanted.items() if isinstance(value, float)]
    near = all(math.isclose(said.pop(name), wanted.pop(name), rel_tol=1e-9) for name in floats)
    return near and said == wanted


def config_of(arch: Architecture, bos: int | None, eos: int | list[int] | None, dtype: str = "float32") -> Config:
    """The `config.json` of an architecture, as transformers reads it; `dtype` is that of the weights beside it."""
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
    assert _is_said(arch, config), f"{arch.family} has no such settings: {arch}"
    return config
