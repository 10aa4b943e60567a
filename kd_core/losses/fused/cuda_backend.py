"""The loss's matmuls on a GPU, which multiplies in the dtype of autocast and adds up in float32."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_core.logit_products import multiply_
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.torch_backend import TorchBackend


class CudaBackend(TorchBackend):
    """Matmuls of factors in `matmul_dtype`, with products in `accum_dtype`."""

    def __init__(self, head: LmHead, chunk_tokens: int, temperatures: Sequence[float]) -> None:
        super().__init__(head, chunk_tokens, temperatures)
        matmul_dtype, accum_dtype = head.precision
        self._cast_weight = head.weight.to(matmul_dtype)
        self._mm_options: dict[str, Any] = {"out_dtype": accum_dtype} if matmul_dtype != accum_dtype else {}
        # dlogits in the dtype of its matmuls, shared by all chunks.
        self._rounded = self._cast_weight.new_empty(self._buffers[1.0].shape if self._mm_options else (0,))

    def _multiply_(self, hidden: Tensor, out: Tensor) -> None:
        multiply_(hidden, self._cast_weight, out, self._cast_weight.dtype)

    def _add_products_(self, gradients: LmHeadGradients, positions: slice, hidden: Tensor, dproduct: Tensor) -> None:
        factor, options = self._cast_weight, self._mm_options
        if options:
            dproduct = self._rounded[: len(dproduct)].copy_(dproduct)
        # dhidden = dproduct @ weight.  [n, D]
        gradients.hidden[positions] = torch.mm(dproduct, factor, **options)
        if gradients.weight is None:
            return
        # dweight += dproduct.T @ hidden.  [V, D]
        hidden, total = hidden.to(factor.dtype), gradients.weight[: len(factor)]
        if options:
            total += torch.mm(dproduct.t(), hidden, **options)
        else:
            total.addmm_(dproduct.t(), hidden)
