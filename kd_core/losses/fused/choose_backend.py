"""The backend of each kind of device, and the chunks that suit it."""

import functools
import importlib.util
from collections.abc import Callable

from torch import Tensor

from kd_core.losses.fused.backend import LossBackend
from kd_core.losses.fused.cpu_backend import CpuBackend
from kd_core.losses.fused.cuda_backend import CudaBackend
from kd_core.losses.fused.lm_head import LmHead

# Positions of a chunk on a CPU: 256 take a quarter less memory than 512, and 1 to 3% more time.
CPU_CHUNK = 256
# Bytes of a chunk's logits on a GPU: enough positions for its matmuls to be fast.
GPU_CHUNK_BYTES = 1.25 * 2**30


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


def default_chunk_tokens(head: LmHead) -> int:
    """Returns the positions of a chunk, where the objective does not set them."""
    if head.weight.device.type == "cpu":
        return CPU_CHUNK
    rows = int(GPU_CHUNK_BYTES / (len(head.weight) * head.precision.accum_dtype.itemsize))
    return max(CPU_CHUNK, rows // CPU_CHUNK * CPU_CHUNK)
