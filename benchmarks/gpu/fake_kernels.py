"""Operators of shapes alone, one for each kernel that a GPU has and a CPU build of torch decomposes on fake tensors.

rms_norm    one kernel forward, one backward by the input, and one more by the weight
silu        one kernel forward, one backward
"""

from typing import Any

import torch
from torch import Tensor


def _operator(name: str, schema: str) -> Any:
    """Makes the operator `fake_cuda::name`, which has no kernel on any device."""

    def no_numbers(*_: Any) -> Any:
        raise NotImplementedError(f"{name} has shapes alone: call it under FakeTensorMode")

    return torch.library.custom_op(f"fake_cuda::{name}", mutates_args=(), schema=schema)(no_numbers)


rms_norm = _operator("rms_norm", "(Tensor x, Tensor? weight) -> (Tensor, Tensor)")
rms_norm_by_input = _operator("rms_norm_by_input", "(Tensor grad, Tensor x, Tensor? weight, Tensor rstd) -> Tensor")
rms_norm_by_weight = _operator("rms_norm_by_weight", "(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> Tensor")
silu = _operator("silu", "(Tensor x) -> Tensor")
silu_by_input = _operator("silu_by_input", "(Tensor grad, Tensor x) -> Tensor")


# Shapes of the results.
rms_norm.register_fake(lambda x, _: (torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)))
rms_norm_by_input.register_fake(lambda *inputs: torch.empty_like(inputs[1]))
rms_norm_by_weight.register_fake(lambda *inputs: torch.empty_like(inputs[2]))
silu.register_fake(torch.empty_like)
silu_by_input.register_fake(lambda *inputs: torch.empty_like(inputs[1]))


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # else zeros for the second output
    ctx.save_for_backward(*inputs, output[1])


def _norm_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    by_weight = rms_norm_by_weight(grad, x, weight, rstd) if ctx.needs_input_grad[1] else None
    return rms_norm_by_input(grad, x, weight, rstd), by_weight


rms_norm.register_autograd(_norm_backward, setup_context=_save_norm)
silu.register_autograd(
    lambda ctx, grad: silu_by_input(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, **_: ctx.save_for_backward(*inputs),
)
