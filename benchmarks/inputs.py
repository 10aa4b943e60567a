"""What every candidate of `benchmarks/losses.py` gets, and the sizes at which it gets it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kd_core.types import TeacherTopK


class Inputs(NamedTuple):
    """Of one step, in the order of `fused_loss`."""

    hidden: Tensor
    weight: Tensor
    teacher: TeacherTopK
    labels: Tensor
    mask: Tensor


Step = Callable[[Inputs], Tensor]
"""The mean loss of the scored positions, differentiable in hidden states and weight."""


class Point(NamedTuple):
    """Sizes (the legend is in `kd_core/types.py`)."""

    positions: int
    vocab: int
    width: int
    top_k: int

    def __str__(self) -> str:
        return f"N={self.positions} V={self.vocab} D={self.width} K={self.top_k}"


def make_inputs(point: Point, precision: str, device: str = "cpu") -> Inputs:
    """Random, the same at every call. `precision`: float32, bfloat16, or autocast (float32 here)."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    n, v, d, k = point
    hidden = torch.randn(n, d).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, d) / d**0.5).to(device, dtype).requires_grad_()
    log_probs, _ = torch.randn(n, k).log_softmax(dim=1).sub(0.1).sort(dim=1, descending=True)
    # Distinct in each row; drawn without a permutation of V a row, whose memory the peak would hide behind.
    ids = (torch.randint(v, (n, 1)) + 97 * torch.arange(k)) % v
    tail = torch.log1p(-log_probs.exp().sum(dim=1))
    teacher = TeacherTopK(ids.to(device), log_probs.to(device), tail.to(device))
    return Inputs(hidden, weight, teacher, torch.randint(v, (n,)).to(device), torch.ones(n, device=device).bool())


def factors(given: Inputs) -> tuple[Tensor, Tensor]:
    """Hidden states and weight in autocast's dtype.

    For what brings its own backward pass, where autocast is no longer on: without this it would multiply in float32.
    """
    device = given.hidden.device.type
    if not torch.is_autocast_enabled(device):
        return given.hidden, given.weight
    dtype = torch.get_autocast_dtype(device)
    return given.hidden.to(dtype), given.weight.to(dtype)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean(each: Tensor, mask: Tensor) -> Tensor:
    """Of the scored positions."""
    return torch.where(mask, each, 0.0).sum() / mask.sum().clamp(min=1)
