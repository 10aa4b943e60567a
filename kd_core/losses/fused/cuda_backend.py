"""The loss's matmuls on a GPU, which multiplies in the dtype of autocast and adds up in float32."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_core.logit_products import multiply_
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.torch_backend import TorchBackend

# A GPU gathers this many rows of the lm_head at a time, half a GiB of 4,096 float32 channels.
GATHERED_ROWS = 32768


def support_is_cheaper(entries: int, vocab_size: int) -> bool:
    """Estimates from the rates of an H100 which pass costs less.

    The pass over the support moves about 26 bytes · K · D a position through memory, half of them atomic additions at
    half the rate: K · D / 5e10 s. The pass over the vocabulary multiplies, 6 V D operations a position: V · D / 1.2e14.
    """
    return 2400 * entries < vocab_size


class CudaMatmuls:
    """Matmuls of factors in `matmul_dtype`, with products in `accum_dtype`."""

    def __init__(self, head: LmHead) -> None:
        self.dtype, accum_dtype = head.precision
        self._weight = head.weight.to(self.dtype)
        self.options: dict[str, Any] = {} if self.dtype == accum_dtype else {"out_dtype": accum_dtype}

    def begin_gradients_(self, gradients: LmHeadGradients, chunk_tokens: int) -> None:
        """Sets the rows to 0 that no chunk of some positions writes: padding, or all where there is no position."""
        gradients.zero_weight_(len(self._weight) if chunk_tokens else 0)

    def multiply_(self, hidden: Tensor, out: Tensor) -> None:
        """Writes hidden @ weight.T to `out` [n, V]."""
        multiply_(hidden, self._weight, out, self._weight.dtype)

    def add_products_(self, gradients: LmHeadGradients, positions: slice, hidden: Tensor, dproduct: Tensor) -> None:
        """Adds to the gradients by hidden states and weight, from the gradient [n, V] by hidden @ weight.T."""
        # dhidden = dproduct @ weight.  [n, D]
        torch.mm(dproduct, self._weight, **self.options, out=gradients.hidden[positions])
        if gradients.weight is None:
            return
        # dweight += dproduct.T @ hidden, added up where it stands. The first chunk writes it.  [V, D]
        total, factors = gradients.weight[: len(self._weight)], (dproduct.t(), hidden.to(self._weight.dtype))
        if positions.start == 0:
            torch.mm(*factors, **self.options, out=total)
        else:
            torch.addmm(total, *factors, **self.options, out=total)


class CudaBackend(TorchBackend):
    """Torch operations between these matmuls, for GPUs without Triton."""

    gathered_rows = GATHERED_ROWS
    support_is_cheaper = staticmethod(support_is_cheaper)

    def __init__(self, head: LmHead, chunk_tokens: int, temperatures: Sequence[float]) -> None:
        super().__init__(head, chunk_tokens, temperatures)
        self._matmuls = CudaMatmuls(head)
        # dlogits in the dtype of its matmuls, shared by all chunks.
        rounded_shape = self._buffers[1.0].shape if self._matmuls.options else (0,)
        self._rounded = head.weight.new_empty(rounded_shape, dtype=self._matmuls.dtype)

    @staticmethod
    def scale_(values: Tensor, factor: Tensor) -> None:
        """Multiplies in place, since to look at the factor would wait for the device."""
        values.mul_(factor)

    def begin_gradients_(self, gradients: LmHeadGradients) -> None:
        """Leaves rows as they are that the first chunk overwrites."""
        self._matmuls.begin_gradients_(gradients, self.chunk_tokens)

    def _multiply_(self, hidden: Tensor, out: Tensor) -> None:
        self._matmuls.multiply_(hidden, out)

    def _add_products_(self, gradients: LmHeadGradients, positions: slice, hidden: Tensor, dproduct: Tensor) -> None:
        if self._matmuls.options:
            dproduct = self._rounded[: len(dproduct)].copy_(dproduct)
        self._matmuls.add_products_(gradients, positions, hidden, dproduct)
