"""Precision of matmuls: float32, or bfloat16 where the device has instructions for it.

A setting of `auto` is resolved once, at the start of a command. Records and caches hold the result.
"""

import logging
import platform
from typing import Literal, NamedTuple, cast, get_args

import torch

from kd_core.errors import UsageError

Dtype = Literal["float32", "bfloat16"]
Precision = Literal["auto", "float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = logging.getLogger("kd")


class BFloat16Support(NamedTuple):
    """`is_fast` if bfloat16 matmuls are faster than float32 ones on a device. `reason` names the instructions."""

    is_fast: bool
    reason: str


class ChosenPrecision(NamedTuple):
    """A precision, the reason of its choice, and its drawback on this device (empty if it has none)."""

    precision: Dtype
    reason: str
    drawback: str

    def __str__(self) -> str:
        return f"{self.precision} ({self.reason})"

    def warn_if_slow(self, setting: str) -> None:
        """Logs one warning that names the `setting` to change, if the device only emulates the precision."""
        if self.drawback:
            log.warning(
                "%s=bfloat16 is slow here: %s, so a matmul may take ten times as long as in float32. Unless the "
                "numbers must continue as they began, start again with %s=float32.", setting, self.drawback, setting,
            )  # fmt: skip


def _has_bfloat16_instructions() -> bool:
    """Checks that this CPU has bfloat16 instructions that oneDNN uses.

    oneDNN also multiplies bfloat16 by emulation, and may be limited to fewer instructions by its environment.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # on ARM, oneDNN supports bfloat16 only where the CPU has the instructions
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    return native and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def bfloat16_support(device: torch.device) -> BFloat16Support:
    """Returns whether a device has instructions for bfloat16 matmuls. All calls on one machine return the same."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return BFloat16Support(
            is_fast, f"compute capability {major}.{minor} {'has' if is_fast else 'lacks'} bfloat16 matmuls"
        )
    is_fast = _has_bfloat16_instructions()
    capability = torch.backends.cpu.get_cpu_capability()
    return BFloat16Support(
        is_fast, f"this CPU ({capability}) {'has' if is_fast else 'lacks'} instructions for bfloat16 matmuls"
    )


def choose_precision(
    setting: Precision, device: torch.device, recorded: str | None = None, whose: str = "run"
) -> ChosenPrecision:
    """Resolves a precision for a device: `auto` becomes the recorded precision, else the fastest one.

    Args:
        setting: the precision as set.
        device: where matmuls run.
        recorded: the precision of the run or cache that is continued.
        whose: what is continued, in the user's words.

    Raises:
        UsageError: `recorded` is no precision.
    """
    support = bfloat16_support(device)
    if setting != "auto":
        precision, reason = setting, "as configured"
    elif recorded is not None:
        if recorded not in DTYPES:
            raise UsageError(f"the {whose} to continue has precision {recorded!r}; wanted {' or '.join(DTYPES)}.")
        precision, reason = cast(Dtype, recorded), f"as recorded in the {whose}"
    else:
        precision, reason = "bfloat16" if support.is_fast else "float32", f"auto: {support.reason}"
    return ChosenPrecision(precision, reason, "" if precision == "float32" or support.is_fast else support.reason)


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the torch dtype of a precision, with `auto` resolved for the device.

    Raises:
        UsageError: no such precision.
    """
    if precision in DTYPES:
        return DTYPES[precision]
    if precision != "auto":
        raise UsageError(f"precision: got {precision!r}; wanted one of {', '.join(get_args(Precision))}.")
    return DTYPES[choose_precision(precision, device).precision]
