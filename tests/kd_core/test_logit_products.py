"""Products of an lm_head: float32 logits from bfloat16 factors, and a setting of the process that threads share."""

from contextlib import ExitStack

import pytest
import torch

from kd_core.logit_products import (
    GPU_CHUNK_BYTES,
    _float32_in_bfloat16,
    chunk_positions,
    multiply_,
    product_weight,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_factors_have_products_that_are_not_rounded(matmul_dtype: torch.dtype) -> None:
    """Against the same factors in float64. bfloat16 factors have exact products in float32: only sums round."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 96, generator=generator).bfloat16() for rows in (33, 1001))
    out, truth = torch.full((33, 1001), torch.nan), hidden.double() @ weight.double().t()
    multiply_(hidden, product_weight(weight), out, matmul_dtype)
    assert (out - truth).abs().max() < 3e-5 < (hidden @ weight.t() - truth).abs().max()


def test_users_of_the_setting_of_the_process_may_overlap() -> None:
    """The first of two threads leaves first: had the second restored what it found, bfloat16 would stay."""
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, first, second = settings.fp32_precision, ExitStack(), ExitStack()
    for stack in (first, second):
        stack.enter_context(_float32_in_bfloat16())
    first.close()
    assert settings.fp32_precision == "bf16"
    second.close()
    assert settings.fp32_precision == before


def test_chunks_are_fixed_on_a_cpu_and_fill_a_budget_on_a_gpu() -> None:
    assert {chunk_positions(V, CPU) for V in (300, 151_936)} == {256}
    for V in (300, 49_152, 151_936, 1 << 24):
        chunk = chunk_positions(V, torch.device("cuda"))
        assert chunk % 256 == 0
        assert chunk == 256 or 4 * V * chunk <= GPU_CHUNK_BYTES < 4 * V * (chunk + 256)
