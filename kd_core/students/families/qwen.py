"""Qwen 2 and 2.5 (arXiv 2407.10671), with biases of q, k and v, and Qwen 3 (arXiv 2505.09388), with q and k norms."""

from typing import Any

from kd_core.students.decoder.architecture import Architecture
from kd_core.students.families.family import FULL, SLIDING, Config, Family, read_attention_bias


def _windows(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    # Layers from `max_window_layers` on have the window, unless `layer_types` lists the kind of each layer.
    layers, first = int(config["num_hidden_layers"]), int(config.get("max_window_layers", 28))
    kinds: list[str] = config.get("layer_types") or [SLIDING if layer >= first else FULL for layer in range(layers)]
    if window is None or SLIDING not in kinds:
        return {"windows": None}
    return {"windows": tuple(int(window) if kind == SLIDING else None for kind in kinds)}


def _read_qwen2(config: Config) -> dict[str, Any]:
    return {"qkv_bias": True, **_windows(config)}


def _read_qwen3(config: Config) -> dict[str, Any]:
    return {"qk_norm": True, **read_attention_bias(config), **_windows(config)}


def _write(arch: Architecture) -> Config:
    windows = arch.windows or (None,) * arch.num_layers
    sizes = {window for window in windows if window is not None}
    return {
        "attention_bias": arch.qkv_bias,
        "use_sliding_window": bool(sizes),
        "sliding_window": max(sizes, default=None),
        "max_window_layers": arch.num_layers,
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


NO_MLP_BIAS = (("mlp_bias", False),)
QWEN2 = Family("Qwen2ForCausalLM", _read_qwen2, _write, kv_heads=32, expects=NO_MLP_BIAS)
QWEN3 = Family("Qwen3ForCausalLM", _read_qwen3, _write, head_dim=128, kv_heads=32, expects=NO_MLP_BIAS)
