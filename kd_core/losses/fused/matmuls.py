"""The head's three matmuls over the whole vocabulary: logits into a buffer, and their gradient back out of it.

On a CPU, a factor that has to be float32 is cast in blocks of the vocabulary, whose copies stay in the processor's
cache; bfloat16 products are added to the float32 gradient in such blocks, and the gradient by logits is rounded in
place.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd_core.losses.fused.lm_head import Head, HeadGradients

BLOCK_ROWS = 2048
ROUNDED_ROWS = 8


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(rows, start + BLOCK_ROWS)) for start in range(0, rows, BLOCK_ROWS))


def round_(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a dtype of half their size, in their own memory: row after row moves to its front."""
    n, V = values.shape
    rounded = values.view(dtype).flatten()[: n * V].view(n, V)
    for block in (slice(start, start + ROUNDED_ROWS) for start in range(0, n, ROUNDED_ROWS)):
        rounded[block] = values[block].to(dtype)  # first a copy, since the first rows' old and new places overlap
    return rounded


@dataclass(frozen=True)
class Matmuls:
    """A head, and what its matmuls keep from chunk to chunk: fresh memory costs more than what is written to it."""

    head: Head
    factor: Tensor
    """The weight in the dtype of the backward matmuls."""
    scratch: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def of(cls, head: Head) -> "Matmuls":
        """Nothing is multiplied yet."""
        precision, weight = head.precision, head.weight
        return cls(head, weight.to(precision.backward_dtype(weight.device)))

    def _kept(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """A scratch tensor that chunks share."""
        if name not in self.scratch:
            self.scratch[name] = like.new_empty(shape)
        return self.scratch[name][: shape[0]]

    def logits_(self, hidden: Tensor, out: Tensor) -> Tensor | None:
        """Write the logits of `hidden` to `out`; returns what their gradient is multiplied by, where capped."""
        weight, keep = self.head.weight, self.head.precision.keep
        if out.device.type != "cpu":
            factor = self.factor
            torch.mm(hidden.to(factor.dtype), factor.t(), out_dtype=keep, out=out)
        elif weight.dtype == keep:
            torch.mm(hidden.to(keep), weight.t(), out=out)
        else:
            hidden = hidden.to(keep)
            for block in _blocks(len(weight)):
                rows = self._kept("rows", weight[block].shape, hidden).copy_(weight[block])
                torch.mm(hidden, rows.t(), out=out[:, block])
        return self.head.finish_(out, self.head.bias)

    def add_gradients_(self, gradients: HeadGradients, at: slice, hidden: Tensor, by_logits: Tensor) -> None:
        """Add a chunk: `by_logits` [n, V] is the gradient by scale · hidden @ weight.T + bias, and is used up."""
        factor, keep = self.factor, self.head.precision.keep
        if gradients.bias is not None:
            gradients.bias[: len(factor)] += by_logits.sum(dim=0)
        if self.head.scale != 1:
            by_logits.mul_(self.head.scale)
        if factor.dtype != keep:
            by_logits = self._rounded(by_logits)
        wide: dict[str, Any] = {"out_dtype": keep} if factor.dtype != keep and factor.device.type != "cpu" else {}
        gradients.hidden[at] = torch.mm(by_logits, factor, **wide)
        if gradients.weight is not None:
            self._add_by_weight_(gradients.weight[: len(factor)], hidden.to(factor.dtype), by_logits, wide)

    def _rounded(self, by_logits: Tensor) -> Tensor:
        """In the dtype of the backward matmuls; on a CPU in the same memory."""
        if self.factor.device.type == "cpu":
            return round_(by_logits, self.factor.dtype)
        return self._kept("rounded", by_logits.shape, self.factor).copy_(by_logits)

    def _add_by_weight_(self, total: Tensor, hidden: Tensor, by_logits: Tensor, wide: dict[str, Any]) -> None:
        """Add by_logitsᵀ @ hidden; rounded products on a CPU in blocks."""
        if by_logits.dtype == total.dtype:
            total.addmm_(by_logits.t(), hidden)
        elif wide:
            total += torch.mm(by_logits.t(), hidden, **wide)
        else:
            for block in _blocks(len(total)):
                product = self._kept("product", total[block].shape, hidden)
                # Not `total[block] += …`, which also copies the block onto itself.
                total[block].add_(torch.mm(by_logits[:, block].t(), hidden, out=product))
