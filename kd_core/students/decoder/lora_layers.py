"""Low-rank adapters (LoRA, arXiv 2106.09685): a linear layer with a small trained product beside its frozen weight."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kd_core.students.decoder.decoder import Decoder
from kd_core.students.decoder.sharded_values import own_box, whole

ADAPTER_PARAMETERS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LowRank:
    """The settings that all adapters of a student share; see `lora.Adapted`."""

    rank: int
    alpha: float
    dropout: float
    rank_stabilised: bool

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / rank, or alpha / √rank (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def dropped(x: Float[Tensor, "*B D"], rate: float) -> Float[Tensor, "*B D"]:
    """Dropout whose mask is that of the whole activation, of which a rank takes the part that it holds.

    So tensor-parallel ranks, whose random state is the same, drop what one process would drop.
    """
    if rate == 0:
        return x
    keep = (torch.rand(x.shape, device=x.device) >= rate).to(x.dtype) / (1 - rate)
    if not isinstance(x, DTensor):
        return x * keep
    local, box = own_box(x)
    assert box is not None, x.placements
    return DTensor.from_local(
        local * keep[box], x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


class LoraLinear(nn.Linear):
    """y = W x + b + scale · B A dropout(x); the weight keeps its name, A and B stand beside it."""

    def __init__(self, like: nn.Linear, settings: LowRank) -> None:
        has_bias = like.bias is not None  # pyright: ignore[reportUnnecessaryComparison] (None without one)
        super().__init__(like.in_features, like.out_features, has_bias, device="meta")
        self.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(settings.rank, like.in_features, device="meta"))
        self.lora_B = nn.Parameter(torch.empty(like.out_features, settings.rank, device="meta"))
        self.settings = settings

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        learns = self.training and torch.is_grad_enabled()  # nothing else in a student has modes: nobody sets them
        x = dropped(input, self.settings.dropout if learns else 0.0)
        beside = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(input, self.weight, self.bias) + self.settings.scale * beside

    def merged_weight(self) -> Float[Tensor, "out in"]:
        """W + scale · B A, whole, on every rank; every rank must call it."""
        return whole(self.weight) + self.settings.scale * (whole(self.lora_B) @ whole(self.lora_A))


def adapted_layers(model: Decoder) -> dict[str, LoraLinear]:
    """The linear layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def base_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """All parameters that are no adapter's; tied ones once."""
    return {name: p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] not in ADAPTER_PARAMETERS}
