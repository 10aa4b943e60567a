"""Mistral (arXiv 2310.06825): Llama where every layer has the same sliding window, or none has."""

from typing import Any

from kd_core.students.decoder.architecture import Architecture
from kd_core.students.families.family import NO_BIAS, Config, Family


def _read(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window", 4096)
    return {"windows": None if window is None else (int(window),) * int(config["num_hidden_layers"])}


def _write(arch: Architecture) -> Config:
    return {"sliding_window": arch.window(0)}


MISTRAL = Family("MistralForCausalLM", _read, _write, kv_heads=8, expects=(*NO_BIAS, ("layer_types", None)))
