"""One cast to autocast's dtype for several linear layers that read the same values."""

from typing import Any

import torch
from torch import Tensor, nn


class _SharedCast(torch.autograd.Function):
    """Casts once for several readers, and adds up their gradients in the dtype of the input.

    Autocast casts for each reader, keeps each copy for the backward pass, and adds up gradients in the same precision
    and order. Both ways give the same bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, readers: int) -> tuple[Tensor, ...]:
        ctx.dtype = x.dtype
        cast = x.to(dtype)
        return tuple(cast.view_as(cast) for _ in range(readers))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # The last reader's gradient comes first in a backward pass.
        last, *others = reversed(gradients)
        total = last.to(ctx.dtype)
        for gradient in others:
            total = total + gradient
        return total, None, None


def cast_once(x: Tensor, *readers: nn.Module) -> tuple[Tensor, ...]:
    """Returns `x` for each reader: in autocast's dtype if all of them are plain linear layers, else as it is.

    Layers that do more with their input than a matmul, such as adapters with dropout, get its own dtype.
    """
    device = x.device.type
    is_casting = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not is_casting or any(type(reader) is not nn.Linear for reader in readers):
        return (x,) * len(readers)
    return _SharedCast.apply(x, torch.get_autocast_dtype(device), len(readers))
