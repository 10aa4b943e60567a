"""SmolLM3 (Hugging Face, 2025): Llama where every fourth layer has no RoPE (arXiv 2501.18795)."""

from typing import Any

from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.families.family import (
    FULL,
    NO_PADDING,
    SLIDING,
    Config,
    Family,
    read_windows,
    with_default_theta,
    write_windows,
)
from kd_core.students.families.llama import read_llama, write_llama


def _read(config: Config) -> dict[str, Any]:
    layers = int(config["num_hidden_layers"])
    # In `no_rope_layers`, 1 stands for a layer with RoPE, and 0 for one without.
    interval, listed = int(config.get("no_rope_layer_interval", 4)), config.get("no_rope_layers")
    flags = [(layer + 1) % interval for layer in range(layers)] if listed is None else listed
    has_rope = tuple(bool(flags[layer]) for layer in range(layers))
    # Layers without RoPE have the window, unless `layer_types` lists the kind of each layer.
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    kinds = config.get("layer_types") or [FULL if rope else SLIDING for rope in has_rope]
    if window is None and config.get("layer_types") and SLIDING in kinds:
        raise UsageError(
            f"layer_types is {kinds}, and use_sliding_window or sliding_window is not set. Set both, or list "
            f"{FULL} for all layers."
        )
    return {**read_llama(config), "rope_layers": has_rope, "windows": read_windows(kinds, window)}


def _write(arch: Architecture) -> Config:
    kinds, window = write_windows(arch)
    return {
        **write_llama(arch),
        "layer_types": kinds,
        "sliding_window": window,
        **NO_PADDING,
        "use_sliding_window": window is not None,
        "no_rope_layers": [int(arch.has_rope(layer)) for layer in range(arch.num_layers)],
    }


SMOLLM3 = Family("SmolLM3ForCausalLM", _read, _write, kv_heads=4, tie_embeddings=True, flatten=with_default_theta(2e6))
