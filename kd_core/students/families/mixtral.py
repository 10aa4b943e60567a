"""Mixtral (arXiv 2401.04088): Mistral whose feed-forwards are mixtures of experts, of which each position takes two."""

from typing import Any

from kd_core.students.decoder.architecture import Architecture, ExpertSettings
from kd_core.students.decoder.experts import ExpertBlock
from kd_core.students.families.family import (
    NO_BIAS,
    Config,
    Family,
    Joined,
    Stacked,
    read_expert_count,
    with_default_theta,
)

MIXTURE = "block_sparse_moe"
EXPERT = f"{MIXTURE}.experts.{{}}"


def _read(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window")
    return {
        "windows": None if window is None else (int(window),) * int(config["num_hidden_layers"]),
        "experts": ExpertSettings(read_expert_count(config, 8), per_token=int(config.get("num_experts_per_tok", 2))),
    }


def _write(arch: Architecture) -> Config:
    assert arch.experts is not None
    return {
        "sliding_window": arch.window(0),
        "num_local_experts": arch.experts.count,
        "num_experts_per_tok": arch.experts.per_token,
    }


MIXTRAL = Family(
    "MixtralForCausalLM",
    _read,
    _write,
    kv_heads=8,
    expects=(*NO_BIAS, ("layer_types", None), ("router_jitter_noise", 0.0)),
    flatten=with_default_theta(1e6),
    block=ExpertBlock,
    joined=(Joined(f"{MIXTURE}.gate", ("mlp.router",)),),
    # w1, w3 and w2 are gate, up and down.
    stacked=(
        Stacked("mlp.experts.gate_up_proj", (f"{EXPERT}.w1.weight", f"{EXPERT}.w3.weight")),
        Stacked("mlp.experts.down_proj", (f"{EXPERT}.w2.weight",)),
    ),
)
