"""The loss's matmuls on a CPU.

bfloat16 factors are multiplied in bfloat16 and added up in float32: bfloat16's speed, float32 logits. A weight that
has to be float32 is cast in blocks of the vocabulary, so that the copies stay in the processor's cache. bfloat16
products are added to the float32 gradient in such blocks too. dlogits is rounded in its own memory.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kd_core.logit_products import multiply_
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.torch_backend import TorchBackend

# Rows of the weight that are cast or added at a time: their copies fit in the processor's cache.
BLOCK_ROWS = 2048
# Rows of dlogits that are rounded at a time.
ROUNDED_ROWS = 8


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(rows, start + BLOCK_ROWS)) for start in range(0, rows, BLOCK_ROWS))


def round_(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts values [n, V] to a dtype of half their size, in their own memory.

    The result is a view of the first half of that memory.
    """
    n, V = values.shape
    rounded = values.view(dtype).flatten()[: n * V].view(n, V)
    # Front to back: a row's new place is never behind its old one, so no row is overwritten before it is read.
    for block in (slice(start, start + ROUNDED_ROWS) for start in range(0, n, ROUNDED_ROWS)):
        # `to` copies first, since old and new places of the first rows overlap.
        rounded[block] = values[block].to(dtype)
    return rounded


class CpuBackend(TorchBackend):
    """Matmuls in blocks that stay in the processor's cache."""

    def __init__(self, head: LmHead, chunk_tokens: int, temperatures: Sequence[float]) -> None:
        super().__init__(head, chunk_tokens, temperatures)
        # bfloat16 factors are twice as fast in the backward matmuls as float32 ones that are multiplied in bfloat16,
        # and precise enough for gradients. Factors of any other dtype are cast up.
        self._in_bfloat16 = head.precision.matmul_dtype == torch.bfloat16
        self._cast_weight = head.weight.to(torch.bfloat16 if self._in_bfloat16 else head.precision.accum_dtype)
        self._scratch: dict[str, Tensor] = {}

    @staticmethod
    def scale_(values: Tensor, factor: Tensor) -> None:
        """Multiplies in place, and skips the usual factor of 1."""
        if factor != 1:
            values.mul_(factor)

    def _scratch_tensor(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """Returns a tensor that all chunks share. The first use fixes how many rows there are at most."""
        if name not in self._scratch:
            self._scratch[name] = like.new_empty(shape)
        return self._scratch[name][: shape[0]]

    def _multiply_(self, hidden: Tensor, out: Tensor) -> None:
        weight, hidden, matmul_dtype = self.head.weight, hidden.to(out.dtype), self.head.precision.matmul_dtype
        if weight.dtype == out.dtype:
            multiply_(hidden, weight, out, matmul_dtype)
            return
        # Cast the weight block by block.
        for block in _blocks(len(weight)):
            rows = self._scratch_tensor("rows", weight[block].shape, hidden).copy_(weight[block])
            multiply_(hidden, rows, out[:, block], matmul_dtype)

    def _add_products_(self, gradients: LmHeadGradients, positions: slice, hidden: Tensor, dproduct: Tensor) -> None:
        factor = self._cast_weight
        if self._in_bfloat16:
            dproduct = round_(dproduct, factor.dtype)
        # dhidden = dproduct @ weight.  [n, D]
        gradients.hidden[positions] = torch.mm(dproduct, factor)
        if gradients.weight is None:
            return
        # dweight += dproduct.T @ hidden. A bfloat16 product is made and added block by block.  [V, D]
        hidden, total = hidden.to(factor.dtype), gradients.weight[: len(factor)]
        if not self._in_bfloat16:
            total.addmm_(dproduct.t(), hidden)
            return
        for block in _blocks(len(total)):
            product = self._scratch_tensor("product", total[block].shape, hidden)
            # Not `total[block] += …`, which also copies the block onto itself.
            total[block].add_(torch.mm(dproduct[:, block].t(), hidden, out=product))
