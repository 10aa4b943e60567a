"""The three matmuls of the lm_head over the whole vocabulary.

    forward      logits [n, V] = hidden [n, D] @ weight.T
    backward     dhidden [n, D] = dlogits [n, V] @ weight [V, D]
                 dweight [V, D] += dlogits.T @ hidden

On a CPU, a weight that has to be float32 is cast in blocks of the vocabulary, so that the copies stay in the
processor's cache. bfloat16 products are added to the float32 gradient in such blocks too. dlogits is rounded in place.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients

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
        rounded[block] = values[block].to(
            dtype
        )  # `to` copies first, since old and new places of the first rows overlap
    return rounded


@dataclass(frozen=True)
class Matmuls:
    """An lm_head, and the tensors that its matmuls reuse from chunk to chunk.

    Fresh memory costs more than what is written to it.
    """

    head: LmHead
    cast_weight: Tensor
    """The weight in the dtype of the backward matmuls."""
    scratch: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def from_head(cls, head: LmHead) -> "Matmuls":
        """Casts the weight for the backward matmuls."""
        precision, weight = head.precision, head.weight
        return cls(head, weight.to(precision.backward_dtype(weight.device)))

    def _scratch_tensor(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """Returns a tensor that all chunks share. The first use fixes how many rows there are at most."""
        if name not in self.scratch:
            self.scratch[name] = like.new_empty(shape)
        return self.scratch[name][: shape[0]]

    def logits_(self, hidden: Tensor, out: Tensor) -> Tensor | None:
        """Writes the logits of `hidden` [n, D] to `out` [n, V].

        Returns:
            The derivative of the soft cap [n, V], or None without a soft cap.
        """
        weight, accum_dtype = self.head.weight, self.head.precision.accum_dtype
        if out.device.type != "cpu":
            # The device multiplies in `matmul_dtype` and adds up in `accum_dtype`.
            factor = self.cast_weight
            torch.mm(hidden.to(factor.dtype), factor.t(), out_dtype=accum_dtype, out=out)
        elif weight.dtype == accum_dtype:
            torch.mm(hidden.to(accum_dtype), weight.t(), out=out)
        else:
            # Cast the weight block by block. The float32 matmul multiplies in bfloat16 (`cpu_matmul_precision`).
            hidden = hidden.to(accum_dtype)
            for block in _blocks(len(weight)):
                rows = self._scratch_tensor("rows", weight[block].shape, hidden).copy_(weight[block])
                torch.mm(hidden, rows.t(), out=out[:, block])
        return self.head.to_logits_(out, self.head.bias)

    def add_gradients_(self, gradients: LmHeadGradients, rows: slice, hidden: Tensor, dlogits: Tensor) -> None:
        """Adds the gradients of one chunk.

        Args:
            gradients: those of all chunks.
            rows: the positions of the chunk.
            hidden: their hidden states [n, D].
            dlogits: the gradient [n, V] by scale · hidden @ weight.T + bias. It is overwritten.
        """
        factor, accum_dtype = self.cast_weight, self.head.precision.accum_dtype
        # dbias = Σ over positions of dlogits.  [V]
        if gradients.bias is not None:
            gradients.bias[: len(factor)] += dlogits.sum(dim=0)
        # From here on dlogits is the gradient by hidden @ weight.T, in the dtype of the backward matmuls.  [n, V]
        if self.head.scale != 1:
            dlogits.mul_(self.head.scale)
        if factor.dtype != accum_dtype:
            dlogits = self._rounded(dlogits)
        # dhidden = dlogits @ weight. A GPU adds up in `accum_dtype` and returns it.  [n, D]
        mm_options: dict[str, Any] = (
            {"out_dtype": accum_dtype} if factor.dtype != accum_dtype and factor.device.type != "cpu" else {}
        )
        gradients.hidden[rows] = torch.mm(dlogits, factor, **mm_options)
        if gradients.weight is not None:
            self._add_weight_gradient_(gradients.weight[: len(factor)], hidden.to(factor.dtype), dlogits, mm_options)

    def _rounded(self, dlogits: Tensor) -> Tensor:
        """Casts dlogits to the dtype of the backward matmuls, on a CPU in its own memory."""
        if self.cast_weight.device.type == "cpu":
            return round_(dlogits, self.cast_weight.dtype)
        return self._scratch_tensor("rounded", dlogits.shape, self.cast_weight).copy_(dlogits)

    def _add_weight_gradient_(self, total: Tensor, hidden: Tensor, dlogits: Tensor, mm_options: dict[str, Any]) -> None:
        """Adds dlogits.T @ hidden [V, D] to `total`."""
        if dlogits.dtype == total.dtype:
            total.addmm_(dlogits.t(), hidden)
        elif mm_options:
            total += torch.mm(dlogits.t(), hidden, **mm_options)
        else:
            # On a CPU, the bfloat16 product is made and added in blocks of the vocabulary that fit in its cache.
            for block in _blocks(len(total)):
                product = self._scratch_tensor("product", total[block].shape, hidden)
                # Not `total[block] += …`, which also copies the block onto itself.
                total[block].add_(torch.mm(dlogits[:, block].t(), hidden, out=product))
