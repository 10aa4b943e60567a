"""The backend of each kind of device."""

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable

from torch import Tensor

from kd_core.losses.fused.backend import LossBackend
from kd_core.losses.fused.cpu_backend import CpuBackend
from kd_core.losses.fused.cuda_backend import CudaBackend

log = logging.getLogger(__name__)


def _why_no_kernels() -> str | None:
    """Returns what Triton lacks to launch kernels, or None. It compiles its launcher in C."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler (gcc or clang, or CC)"
    return None


@functools.cache
def _cuda_backend() -> type[LossBackend]:
    """Returns kernels where Triton can launch them, else torch operations. Torch's CUDA builds bring Triton."""
    if reason := _why_no_kernels():
        log.warning("%s: the loss takes torch operations, which are slower and take more memory", reason)
        return CudaBackend
    from kd_core.losses.fused.triton_backend import TritonBackend  # noqa: PLC0415 (imports Triton)

    return TritonBackend


BACKENDS: dict[str, Callable[[], type[LossBackend]]] = {"cpu": lambda: CpuBackend, "cuda": _cuda_backend}


def backend_of(tensor: Tensor) -> type[LossBackend]:
    """Returns the backend of the device that holds a tensor."""
    return BACKENDS[tensor.device.type]()
