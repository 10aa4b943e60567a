"""Phi-3 (arXiv 2404.14219) and Phi-4 (arXiv 2412.08905, 2503.01743): Llama, with joined matrices in the folder.

One matrix holds q, k and v, and one gate and up. Phi-4-mini rotates three quarters of each attention head's channels.
Models of long contexts have LongRoPE.
"""

from typing import Any

from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.rope import LongRopeScaling
from kd_core.students.families.family import (
    GATE_UP,
    NO_BIAS,
    NO_PADDING,
    QKV,
    Config,
    Family,
    split_rotary_share,
)

# Names of LongRoPE in older files.
OLDER_KINDS = ("su", "yarn")


def _flatten(config: Config) -> Config:
    config = split_rotary_share({"original_max_position_embeddings": 4096, **config})
    for name in ("rope_scaling", "rope_parameters"):
        fields = config.get(name)
        if isinstance(fields, dict) and fields.get("rope_type", fields.get("type")) in OLDER_KINDS:
            config[name] = {**fields, "rope_type": "longrope"}
    return config


def _read(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window")
    windows = None if window is None else (int(window),) * int(config["num_hidden_layers"])
    return {"windows": windows, "rotary_share": config["rotary_share"]}


def _write(arch: Architecture) -> Config:
    fields = {**NO_PADDING, "sliding_window": arch.window(0), "partial_rotary_factor": arch.rotary_share}
    if isinstance(arch.rope_scaling, LongRopeScaling):
        # Readers of Phi-3 look for the original context beside the fields of RoPE.
        fields["original_max_position_embeddings"] = arch.rope_scaling.original_positions
    return fields


PHI3 = Family(
    "Phi3ForCausalLM", _read, _write, expects=(*NO_BIAS, ("layer_types", None)), flatten=_flatten, joined=(QKV, GATE_UP)
)
