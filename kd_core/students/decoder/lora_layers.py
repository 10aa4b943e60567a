"""Low-rank adapters (LoRA, arXiv 2106.09685): linear layers with a small trained product beside a frozen weight."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd_core.sharded_values import full_tensor, times_mask

ADAPTER_PARAMETERS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LoraSettings:
    """Settings that all adapters of a student share. `starts/lora_start.py` describes them."""

    rank: int
    alpha: float
    dropout: float
    rank_stabilised: bool

    @property
    def scale(self) -> float:
        """Returns the factor on B A: alpha / rank, or alpha / √rank if rank-stabilised (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def sharded_dropout(x: Float[Tensor, "*B D"], rate: float) -> Float[Tensor, "*B D"]:
    """Applies dropout with a mask drawn for the whole activation, of which a rank uses its part.

    Tensor-parallel ranks have the same random state, so together they drop what one process would drop.
    """
    if rate == 0:
        return x
    # Zero with probability `rate`, and scale the rest by 1/(1 − rate), so that the expected value stays.  [*B, D]
    mask = (torch.rand(x.shape, device=x.device) >= rate).to(x.dtype) / (1 - rate)
    # `x.shape` was the global shape: multiply this rank's values by their part of the mask.
    return times_mask(x, mask)


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: y = W x + b + scale · B A dropout(x).

    The weight keeps its name. A [rank, in] and B [out, rank] are parameters beside it.
    """

    def __init__(self, like: nn.Linear, settings: LoraSettings) -> None:
        has_bias = like.bias is not None  # pyright: ignore[reportUnnecessaryComparison] (None without one)
        super().__init__(like.in_features, like.out_features, has_bias, device="meta")
        self.requires_grad_(False)  # W and b are frozen, A and B are added after this
        self.lora_A = nn.Parameter(torch.empty(settings.rank, like.in_features, device="meta"))
        self.lora_B = nn.Parameter(torch.empty(like.out_features, settings.rank, device="meta"))
        self.settings = settings

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        # Evaluation turns gradients off and does not call `eval()`, as nothing else in a student depends on `training`.
        is_learning = self.training and torch.is_grad_enabled()
        x = sharded_dropout(input, self.settings.dropout if is_learning else 0.0)
        # Through the rank first: x Aᵀ [..., rank], then · Bᵀ [..., out].
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(input, self.weight, self.bias) + self.settings.scale * update

    def merged_weight(self) -> Float[Tensor, "out in"]:
        """Returns the whole W + scale · B A on every rank. All ranks must call it together."""
        return full_tensor(self.weight) + self.settings.scale * (full_tensor(self.lora_B) @ full_tensor(self.lora_A))


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Returns the linear layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns all parameters but those of adapters, by name. Tied ones are in it once."""
    return {name: p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] not in ADAPTER_PARAMETERS}
