"""The backend of each kind of device."""

from collections.abc import Callable, Sequence

from kd_core.losses.fused.backend import LossBackend
from kd_core.losses.fused.cpu_backend import CpuBackend
from kd_core.losses.fused.cuda_backend import CudaBackend
from kd_core.losses.fused.lm_head import LmHead

BACKENDS: dict[str, Callable[[LmHead, int, Sequence[float]], LossBackend]] = {"cpu": CpuBackend, "cuda": CudaBackend}


def make_backend(head: LmHead, chunk_tokens: int, temperatures: Sequence[float]) -> LossBackend:
    """Makes the backend of the device that holds the lm_head, for chunks of at most `chunk_tokens` positions."""
    return BACKENDS[head.weight.device.type](head, chunk_tokens, temperatures)
