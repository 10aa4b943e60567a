"""The loss's matmuls on a GPU, which multiplies in the dtype of autocast and adds up in float32."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_core.logit_products import multiply_
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.torch_backend import TorchBackend


class CudaMatmuls:
    """Matmuls of factors in `matmul_dtype`, with products in `accum_dtype`."""

    def __init__(self, head: LmHead) -> None:
        self.dtype, accum_dtype = head.precision
        self._weight = head.weight.to(self.dtype)
        self.options: dict[str, Any] = {} if self.dtype == accum_dtype else {"out_dtype": accum_dtype}

    def multiply_(self, hidden: Tensor, out: Tensor) -> None:
        """Writes hidden @ weight.T to `out` [n, V]."""
        multiply_(hidden, self._weight, out, self._weight.dtype)

    def add_products_(self, gradients: LmHeadGradients, positions: slice, hidden: Tensor, dproduct: Tensor) -> None:
        """Adds to the gradients by hidden states and weight, from the gradient [n, V] by hidden @ weight.T."""
        # dhidden = dproduct @ weight.  [n, D]
        torch.mm(dproduct, self._weight, **self.options, out=gradients.hidden[positions])
        if gradients.weight is not None:
            # dweight += dproduct.T @ hidden, added up where it stands.  [V, D]
            total = gradients.weight[: len(self._weight)]
            torch.addmm(total, dproduct.t(), hidden.to(self._weight.dtype), **self.options, out=total)


class CudaBackend(TorchBackend):
    """Torch operations between these matmuls, for GPUs without Triton."""

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

    def _multiply_(self, hidden: Tensor, out: Tensor) -> None:
        self._matmuls.multiply_(hidden, out)

    def _add_products_(self, gradients: LmHeadGradients, positions: slice, hidden: Tensor, dproduct: Tensor) -> None:
        if self._matmuls.options:
            dproduct = self._rounded[: len(dproduct)].copy_(dproduct)
        self._matmuls.add_products_(gradients, positions, hidden, dproduct)
