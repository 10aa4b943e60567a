"""Which precision is taken on which device, held to the processor's own list of instructions."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd_core.errors import UsageError
from kd_core.parallel.config import Parallel
from kd_core.precision import bfloat16_support, choose_precision, dtype_of

CPU = torch.device("cpu")
INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them on x86-64 and on ARM


def _flags_of_the_processor() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}


@pytest.mark.skipif(platform.system() != "Linux", reason="other systems list no instructions in a file")
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch is told to use fewer instructions")
def test_auto_goes_by_the_instructions_that_the_processor_has() -> None:
    has_bfloat16 = bool(INSTRUCTIONS & _flags_of_the_processor())
    assert choose_precision("auto", CPU).precision == ("bfloat16" if has_bfloat16 else "float32")


def test_auto_is_float32_where_torch_is_held_to_avx2() -> None:
    code = "import torch; from kd_core.precision import *; print(choose_precision('auto', torch.device('cpu')))"
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | limits, check=True
    )
    expected = "bfloat16" if platform.machine() in ("arm64", "aarch64") and bfloat16_support(CPU).is_fast else "float32"
    assert done.stdout.startswith(f"{expected} (auto: this CPU (")


def test_what_is_set_or_was_begun_wins_over_the_device() -> None:
    assert choose_precision("float32", CPU, recorded="bfloat16").precision == "float32"
    assert choose_precision("bfloat16", CPU, recorded="float32")[:2] == ("bfloat16", "as configured")
    for begun in ("float32", "bfloat16"):
        assert choose_precision("auto", CPU, recorded=begun)[:2] == (begun, "as recorded in the run")
    with pytest.raises(UsageError, match="the cache to continue has precision 'float16'; wanted float32 or bfloat16"):
        choose_precision("auto", CPU, recorded="float16", whose="cache")


def test_emulated_bfloat16_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="kd"):
        choose_precision("float32", CPU).warn_if_slow("dtype")
        assert not caplog.text
        choose_precision("bfloat16", CPU).warn_if_slow("dtype")
    assert ("start again with dtype=float32" in caplog.text) != bfloat16_support(CPU).is_fast


def test_a_library_user_gets_the_same_choice() -> None:
    chosen = choose_precision("auto", CPU).precision
    with Parallel().autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype_of("auto", CPU) == {"float32": torch.float32, "bfloat16": torch.bfloat16}[chosen]
    with pytest.raises(UsageError, match="got 'half'; wanted one of auto, float32, bfloat16"):
        dtype_of("half", CPU)  # type: ignore[arg-type]
