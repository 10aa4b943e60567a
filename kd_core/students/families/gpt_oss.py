"""gpt-oss (arXiv 2508.10925): experts with biases and a clamped SwiGLU, and attention with sinks.

Layers alternate between a window and none. Matrices of experts map from the left, x W, and gate and up alternate.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kd_core.errors import UsageError
from kd_core.sharded_values import local_values
from kd_core.students.decoder.architecture import Architecture, ExpertSettings
from kd_core.students.decoder.experts import ExpertBlock, Experts, Groups, multiply_groups
from kd_core.students.families.family import (
    FULL,
    SLIDING,
    Config,
    Family,
    Joined,
    read_expert_count,
    read_windows,
    write_windows,
)

LIMIT, SLOPE = 7.0, 1.702
# YaRN as files without such a field have it, in transformers.
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


class ClampedExperts(Experts):
    """Experts of F channels: gate and up in turn [E, D, 2F] and down [E, F, D], with biases."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__(arch)
        (_, D, F), both = self.down_proj.shape, self.gate_up_proj.shape[1]
        self.gate_up_proj = nn.Parameter(torch.empty(self.count, D, both))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(self.count, both))
        self.down_proj = nn.Parameter(torch.empty(self.count, F, D))
        self.down_proj_bias = nn.Parameter(torch.empty(self.count, D))

    def _linear(self, x: Float[Tensor, "S D"], weight: Tensor, bias: Tensor, groups: Groups) -> Float[Tensor, "S F"]:
        product = multiply_groups(x, local_values(weight), groups.ends)
        # Rows of other ranks get no bias, and so give none their gradients, which the kernel leaves undefined.  [S, F]
        count = len(groups.ends)
        biases = local_values(bias).index_select(0, groups.experts.clamp(max=count - 1))
        return product + torch.where((groups.experts < count)[:, None], biases, 0).to(product.dtype)

    def feed_forward(self, x: Float[Tensor, "S D"], groups: Groups) -> Float[Tensor, "S D"]:
        """Computes down((up(x) + 1) ⊙ gate(x) · σ(1.702 · gate(x))) of each row's expert, with gate and up clamped."""
        both = self._linear(x, self.gate_up_proj, self.gate_up_proj_bias, groups)
        # [S, 2F] → [S, F] each
        gate, up = both[:, ::2].clamp(max=LIMIT), both[:, 1::2].clamp(-LIMIT, LIMIT)
        hidden = (up + 1) * gate * torch.sigmoid(SLOPE * gate)
        return self._linear(hidden, self.down_proj, self.down_proj_bias, groups)


class GptOssBlock(ExpertBlock):
    """A transformer block with clamped experts, and a bias of the router."""

    experts = ClampedExperts
    router_bias = True


def _flatten(config: Config) -> Config:
    """Adds defaults of transformers.

    Raises:
        UsageError: the weights are quantised.
    """
    if config.get("quantization_config") is not None:
        raise UsageError(
            "quantization_config: the experts are quantised (MXFP4); wanted floats of 16 bits or more. Load the folder "
            "with transformers, by from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True)), and save "
            "it again by save_pretrained."
        )
    if not config.get("rope_scaling") and config.get("rope_parameters") is None:
        config = {**config, "rope_scaling": YARN}
    return {"rope_theta": 150_000.0, "sliding_window": 128, **config}


def _read(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", True))
    kinds = config.get("layer_types") or [
        FULL if layer % 2 else SLIDING for layer in range(int(config["num_hidden_layers"]))
    ]
    count, per_token = read_expert_count(config, 128), int(config.get("num_experts_per_tok", 4))
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "windows": read_windows(kinds, config["sliding_window"]),
        "attention_sinks": True,
        "experts": ExpertSettings(count, per_token),
    }


def _write(arch: Architecture) -> Config:
    assert arch.experts is not None
    kinds, window = write_windows(arch)
    # transformers scales RoPE by YARN where no field says otherwise.
    unscaled = {"rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta}}
    return {
        **({} if arch.rope_scaling else unscaled),
        "attention_bias": arch.qkv_bias,
        "layer_types": kinds,
        "sliding_window": window or 128,
        "num_local_experts": arch.experts.count,
        "num_experts_per_tok": arch.experts.per_token,
        "swiglu_limit": LIMIT,
        "swiglu_alpha": SLOPE,
    }


GPT_OSS = Family(
    "GptOssForCausalLM",
    _read,
    _write,
    head_dim=64,
    kv_heads=8,
    expects=(("mlp_bias", False), ("swiglu_limit", LIMIT), ("swiglu_alpha", SLOPE)),
    flatten=_flatten,
    block=GptOssBlock,
    joined=(Joined("self_attn.sinks", ("self_attn.sinks.weight",)),),
)
