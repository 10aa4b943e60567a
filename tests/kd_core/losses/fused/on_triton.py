"""The loss through its Triton kernels on the CPU, run by Triton's interpreter. It is also a plugin for pytest:

python -m pytest -p tests.kd_core.losses.fused.on_triton tests/kd_core/losses
"""

import importlib

import pytest
from torch import Tensor

from kd_core.losses.fused import choose_backend
from kd_core.losses.fused.cuda_backend import CudaMatmuls
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients

# Columns that a program holds at a time: most vocabularies of the tests take several, the last one in part.
BLOCK = 16


class CpuMatmuls(CudaMatmuls):
    """The GPU's matmuls on a CPU, which has none of factors in half precision with float32 products."""

    def __init__(self, head: LmHead) -> None:
        super().__init__(head)
        self.options, self._weight = {}, self._weight.to(head.precision.accum_dtype)

    def multiply_(self, hidden: Tensor, out: Tensor) -> None:
        super().multiply_(hidden.to(self.dtype), out)

    def add_products_(self, gradients: LmHeadGradients, positions: slice, hidden: Tensor, dproduct: Tensor) -> None:
        super().add_products_(gradients, positions, hidden.to(self.dtype), dproduct.to(self._weight.dtype))


def use_triton(patch: pytest.MonkeyPatch) -> None:
    """Take the loss of CPU tensors through the kernels."""
    # Imported here, since Triton does not install everywhere.
    logit_operators = importlib.import_module("kd_core.kernels.logit_operators")
    triton_backend = importlib.import_module("kd_core.losses.fused.triton_backend")
    patch.setitem(choose_backend.BACKENDS, "cpu", lambda: triton_backend.TritonBackend)
    patch.setattr(triton_backend, "CudaMatmuls", CpuMatmuls)
    patch.setattr(logit_operators, "BLOCK", BLOCK)


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)
