"""The functions of torch that ask a GPU, replaced for fake CUDA tensors (`fake_cuda.py`). For a process of its own."""

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils

from benchmarks.gpu import fake_kernels

# Properties that code may ask for to choose sizes.
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3 (fake)", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
    shared_memory_per_block_optin=232448,
)  # fmt: skip


class _Event:
    """An event of a stream. All work is done at once, but whoever waits for it on the host is counted, once."""

    on_synchronize: ClassVar[Callable[[str], None]]

    def __init__(self, *_: object, **__: object) -> None:
        self.is_awaited = False

    def record(self, *_: object) -> None:
        self.is_awaited = False

    def wait(self, *_: object) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self, *_: object) -> None:
        if not self.is_awaited:
            self.is_awaited = True
            _Event.on_synchronize("synchronize")


class _Stream(_Event):
    def wait_stream(self, *_: object) -> None: ...
    def wait_event(self, *_: object) -> None: ...
    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def patch(on_synchronize: Callable[[str], None]) -> None:
    """Replaces functions of torch that ask a real GPU. `on_synchronize` is called where one would be waited for."""
    _Event.on_synchronize = staticmethod(on_synchronize)
    cuda: Any = torch.cuda
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "_lazy_init": lambda: None, "set_device": lambda *_: None, "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_, **__: True, "synchronize": lambda *_: _Event().synchronize(),
        "Stream": _Stream, "Event": _Event, "stream": lambda *_: contextlib.nullcontext(),
        "current_stream": lambda *_: _Stream(), "default_stream": lambda *_: _Stream(),
        "get_device_name": lambda *_: H100.name, "get_device_properties": lambda *_: H100,
        "mem_get_info": lambda *_: (H100.total_memory, H100.total_memory), "memory_allocated": lambda *_: 0,
    }.items():  # fmt: skip
        setattr(cuda, name, value)
    torch.Tensor.record_stream = lambda *_: None
    cuda.amp.common.amp_definitely_not_available = lambda: False  # else autocast turns itself off
    _choose_gpu_kernels()


@functools.cache
def _choose_gpu_kernels() -> None:
    """Makes functions that torch decomposes on fake tensors call the one kernel that they are on a GPU."""
    # There is a device as far as anyone can see, but no memory on it.
    FakeTensorMode.avoid_device_init = property(lambda _: True)
    # Clipping and optimisers take their kernels over lists of tensors.
    _foreach_utils._foreach_supported_types.append(FakeTensor)
    attention, rms_norm, silu, tolist = F.scaled_dot_product_attention, F.rms_norm, F.silu, FakeTensor.tolist

    def flash(q: Any, k: Any, v: Any, **options: Any) -> Any:
        is_flash = options.get("attn_mask") is None and q.dtype in (torch.bfloat16, torch.float16)
        if q.device.type != "cuda" or not is_flash:
            return attention(q, k, v, **options)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(q, k, v, 0.0, options.get("is_causal", False), scale=options.get("scale"))[0]

    def fused_rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        if x.device.type != "cuda":
            return rms_norm(x, shape, weight, eps)
        return fake_kernels.rms_norm(x, weight)[0]

    F.scaled_dot_product_attention, F.rms_norm = flash, fused_rms_norm
    F.silu = lambda x, inplace=False: fake_kernels.silu(x) if x.device.type == "cuda" else silu(x, inplace)
    # A list is one copy to the host. Of fake tensors, torch reads number after number.
    FakeTensor.tolist = lambda x: tolist(x.cpu())
