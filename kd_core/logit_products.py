"""Products of an lm_head with float32 logits, whatever the dtype of the factors.

A logit of 20 rounded to bfloat16 is off by up to 0.06, so products of bfloat16 factors are added up in float32 and
never rounded. Losses and teachers multiply here.
"""

import contextlib
import threading
from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Positions of a chunk on a CPU: 256 take a quarter less memory than 512, and 1 to 3% more time.
CPU_CHUNK = 256
# Bytes of a chunk's logits on a GPU, 1.25 GiB: enough positions for its matmuls to be fast.
GPU_CHUNK_BYTES = 5 << 28


class _Float32InBfloat16:
    """The setting by which float32 matmuls of a CPU multiply in bfloat16 and add up in float32.

    It belongs to the process. The first of several threads sets it, and the last one restores it.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, ""

    @contextlib.contextmanager
    def __call__(self) -> Generator[None]:
        settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] (made at import)
        with self._lock:
            if not self._users:
                self._before, settings.fp32_precision = settings.fp32_precision, "bf16"
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    settings.fp32_precision = self._before


_float32_in_bfloat16 = _Float32InBfloat16()


def product_weight(weight: Float[Tensor, "V D"]) -> Float[Tensor, "V D"]:
    """Returns a weight as `multiply_` reads it fastest, to be cast once for many products.

    A CPU has no matmul of bfloat16 factors with a float32 product, so its factors are float32 tensors.
    """
    return weight.float() if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 else weight


def multiply_(
    hidden: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], out: Float[Tensor, "n V"], matmul_dtype: torch.dtype
) -> None:
    """Writes hidden · weightᵀ to `out`: factors in `matmul_dtype`, added up and stored in the dtype of `out`.

    On a CPU without instructions for it, `matmul_dtype` bfloat16 rounds no factor. Meanwhile it holds for float32
    matmuls of other threads too.
    """
    if hidden.device.type == "cpu":
        in_bfloat16 = matmul_dtype == torch.bfloat16 and out.dtype == torch.float32
        with _float32_in_bfloat16() if in_bfloat16 else contextlib.nullcontext():
            torch.mm(hidden.to(out.dtype), weight.to(out.dtype).t(), out=out)
    else:
        torch.mm(hidden.to(matmul_dtype), weight.to(matmul_dtype).t(), out_dtype=out.dtype, out=out)


def chunk_positions(vocab_size: int, device: torch.device) -> int:
    """Returns how many positions' float32 logits [n, V] exist at a time.

    On a CPU they stay near its cache. On a GPU they fill `GPU_CHUNK_BYTES`, in multiples of 256 positions.
    """
    if device.type == "cpu":
        return CPU_CHUNK
    return max(256, GPU_CHUNK_BYTES // (4 * vocab_size) // 256 * 256)
