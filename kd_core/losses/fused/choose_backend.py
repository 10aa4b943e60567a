"""The backend of each kind of device."""

from collections.abc import Sequence

from kd_core.losses.fused.backend import LossBackend
from kd_core.losses.fused.cpu_backend import CpuBackend
from kd_core.losses.fused.cuda_backend import CudaBackend
from kd_core.losses.fused.lm_head import LmHead

BACKENDS: dict[str, type[LossBackend]] = {"cpu": CpuBackend, "cuda": CudaBackend}


def make_backend(head: LmHead, chunk_tokens: int, temperatures: Sequence[float]) -> LossBackend:
    """Makes the backend of the device that holds the lm_head. Arguments are those of `LossBackend`."""
    return BACKENDS[head.weight.device.type](head, chunk_tokens, temperatures)
