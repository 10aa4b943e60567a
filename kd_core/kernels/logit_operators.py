"""Operators `kd::…` of torch that launch the kernels of `logit_kernels.py`.

Operators, since fake tensors and torch.compile see them as one operation.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kd_core.kernels import logit_kernels

# Launched with numbers where kernels are annotated with compile-time constants.
kernels: Any = logit_kernels

# Columns of a row that a program holds at a time, and its warps. Tests lower the block.
BLOCK = 4096
WARPS = 8


def _special_sizes(columns: Tensor) -> dict[str, Any]:
    return {"SPECIAL": columns.shape[1], "WIDTH": triton.next_power_of_2(columns.shape[1])}


def reduced_block(temperatures: int, with_spread: bool) -> int:
    """Returns the columns that a program reduces at a time, so that its running sums stay in registers."""
    lanes = int(triton.next_power_of_2(temperatures))
    return max(1, BLOCK // lanes // (2 if with_spread else 1))


@torch.library.custom_op("kd::mark_support", mutates_args=("product",))
def mark_support(
    product: Tensor, columns: Tensor, in_shard: Tensor, form: Tensor, bias: Tensor | None, capped: bool
) -> tuple[Tensor, Tensor]:
    """Overwrites the products [n, V] at the columns of the entries with −inf.

    Args:
        product: hidden @ weight.T, in the dtype of all other numbers.
        columns: those of the entries and of the label [n, K + 1].
        in_shard: true for those that this shard holds [n, K + 1].
        form: scale and soft cap [2].
        bias: that of the logits [V].
        capped: true if there is a soft cap.

    Returns:
        Their logits [n, K + 1], 0 for those of other shards, and their slots: the number of the entry that stands for
        the id, K for a label outside the support, K + 1 for what another shard holds.
    """
    logits, slots = product.new_empty(columns.shape), torch.empty_like(columns)
    sizes = _special_sizes(columns)
    if len(product):
        with torch.cuda.device_of(product):
            kernels.mark_support_kernel[(len(product),)](
                product, product.stride(0), columns, in_shard, bias, form, logits, slots, **sizes,
                BIAS=bias is not None, CAP=capped, num_warps=min(16, max(4, sizes["WIDTH"] // 256)),
            )  # fmt: skip
    return logits, slots


@torch.library.custom_op("kd::reduce_tail", mutates_args=())
def reduce_tail(
    product: Tensor, inverse: Tensor, form: Tensor, bias: Tensor | None, capped: bool, with_sum: bool, with_spread: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduces the tail of each row, which is where the products are not −inf.

    Args:
        product: hidden @ weight.T [n, V], after `mark_support`.
        inverse: 1 / τ for each temperature [T].
        form: scale and soft cap [2].
        bias: that of the logits [V].
        capped: true if there is a soft cap.
        with_sum: false leaves Σ z as it is in memory.
        with_spread: false leaves the fourth result so. True takes one temperature.

    Returns:
        The largest logit m [n], −inf where there is no tail; Σ e^((z − m) / τ) [T, n], 1 where there is none; Σ z [n];
        Σ (m − z) e^((z − m) / τ) [n].
    """
    n, T, lanes = len(product), len(inverse), triton.next_power_of_2(len(inverse))
    top, total, spread = (product.new_empty(n) for _ in range(3))
    mass = product.new_empty(T, n)
    if n:
        with torch.cuda.device_of(product):
            kernels.reduce_tail_kernel[(n,)](
                product, product.stride(0), product.shape[1], n, bias, form, inverse, top, mass, total, spread, T=T,
                TEMPERATURES=lanes, BLOCK=reduced_block(T, with_spread), SUM=with_sum, SPREAD=with_spread,
                BIAS=bias is not None, CAP=capped, num_warps=WARPS,
            )  # fmt: skip
    return top, mass, total, spread


@torch.library.custom_op("kd::write_dlogits", mutates_args=("product",))
def write_dlogits(
    product: Tensor,
    inverse: Tensor,
    form: Tensor,
    bias: Tensor | None,
    capped: bool,
    top: Tensor,
    factors: Tensor,
    offset: Tensor,
    columns: Tensor,
    slots: Tensor,
    logits: Tensor,
    values: Tensor,
    dtype: torch.dtype,
) -> None:
    """Overwrites the products [n, V] with the gradient by them.

    The gradient by a logit of the tail is Σ over temperatures of factor · e^((z − m) / τ), plus an offset.

    Args:
        product: hidden @ weight.T [n, V], after `mark_support`.
        inverse: 1 / τ for each temperature [T].
        form: scale and soft cap [2].
        bias: that of the logits [V].
        capped: true if there is a soft cap.
        top: m, the largest logit of the tail [n].
        factors: of each temperature [T, n], 0 where there is no tail.
        offset: added at all columns [n].
        columns: those of the entries and of the label [n, K + 1].
        slots: as `mark_support` returns them.
        logits: as `mark_support` returns them.
        values: what the columns of the entries hold beside the offset, and the label's is given more [n, K + 1].
        dtype: that of the gradient, whose rows [V] begin where the products' rows begin.
    """
    n, V = product.shape
    if n:
        out = product.view(dtype)
        with torch.cuda.device_of(product):
            kernels.write_dlogits_kernel[(n,)](
                product, product.stride(0), out, out.stride(0), V, n, bias, form, inverse, top, factors, offset,
                columns, slots, logits, values, T=len(inverse), **_special_sizes(columns), BLOCK=BLOCK,
                BIAS=bias is not None, CAP=capped, num_warps=WARPS,
            )  # fmt: skip


@torch.library.custom_op("kd::scale_unless_one", mutates_args=("values",))
def scale_unless_one(values: Tensor, factor: Tensor) -> None:
    """Multiplies contiguous values by a factor on their device. A factor of 1 costs no pass over them."""
    if values.numel():
        with torch.cuda.device_of(values):
            kernels.scale_kernel[(triton.cdiv(values.numel(), BLOCK),)](values, factor, values.numel(), BLOCK=BLOCK)


@mark_support.register_fake
def _(product: Tensor, columns: Tensor, *_: Any) -> Any:
    return product.new_empty(columns.shape), torch.empty_like(columns)


@reduce_tail.register_fake
def _(product: Tensor, inverse: Tensor, *_: Any) -> Any:
    n = len(product)
    return product.new_empty(n), product.new_empty(len(inverse), n), product.new_empty(n), product.new_empty(n)
