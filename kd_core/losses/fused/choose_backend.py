"""The backend of each kind of device."""

import functools
import importlib.util
from collections.abc import Callable

from torch import Tensor

from kd_core.losses.fused.backend import LossBackend
from kd_core.losses.fused.cpu_backend import CpuBackend
from kd_core.losses.fused.cuda_backend import CudaBackend


@functools.cache
def _cuda_backend() -> type[LossBackend]:
    """Returns kernels where Triton is installed, as torch's CUDA builds bring it, else torch operations."""
    if importlib.util.find_spec("triton") is None:
        return CudaBackend
    from kd_core.losses.fused.triton_backend import TritonBackend  # noqa: PLC0415 (imports Triton)

    return TritonBackend


BACKENDS: dict[str, Callable[[], type[LossBackend]]] = {"cpu": lambda: CpuBackend, "cuda": _cuda_backend}


def backend_of(tensor: Tensor) -> type[LossBackend]:
    """Returns the backend of the device that holds a tensor."""
    return BACKENDS[tensor.device.type]()
