"""The move of an optimiser by clipped gradients: decided by the host, or by the device without the host."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

EPSILON = 1e-6  # of torch's clipping: g ← g · min(1, max_norm / (‖g‖ + ε))


def decides_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Checks that the optimiser's kernel can scale gradients and leave out a step, on a device that runs behind.

    Only Adam's and AdamW's are taken. Fused SGD allocates momentum without filling it, and a first step that is left
    out would leave it so.
    """
    has_kernel = isinstance(optimizer, torch.optim.Adam) and getattr(optimizer, "_step_supports_amp_scaling", False)
    return device.type == "cuda" and has_kernel


def step_if_finite(optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor, clip_norm: float) -> None:
    """Steps by the clipped gradients unless `loss` [] or their `norm` [] is not finite, and reads neither.

    The kernel divides the gradients by `grad_scale` as it reads them. It changes nothing if `found_inf` is 1.
    """
    # The same clipping, as a divisor: max(1, (‖g‖ + ε) / max_norm).  []
    scale = ((norm + EPSILON) / clip_norm).clamp(min=1.0) if clip_norm else None
    # A sum is finite if both of its parts are.  []
    not_finite = (loss + norm).isfinite().logical_not().float()
    vars(optimizer).update(grad_scale=scale, found_inf=not_finite)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]


def clip_now(optimizer: torch.optim.Optimizer) -> None:
    """Divides the gradients by the scale that `step_if_finite` has left to the kernel, if any, before a step begins."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    vars(optimizer).update(grad_scale=None)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale)


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], norm: Tensor, clip_norm: float
) -> None:
    """Steps by the clipped gradients. Reads their `norm` [], so that gradients below `clip_norm` are not touched."""
    # Far below 1, torch's factor is exactly 1. Close to it, torch decides in float32.
    if clip_norm and float(norm) + EPSILON > 0.999 * clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    optimizer.step()
