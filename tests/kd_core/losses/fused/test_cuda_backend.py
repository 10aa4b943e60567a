"""The torch operations of a GPU without Triton against the float64 oracle, on the CPU if there is no GPU."""

from dataclasses import replace

import pytest
import torch

from kd_core.losses.fused import choose_backend, cuda_backend
from kd_core.types import LmHeadForm
from tests.kd_core.losses.cases import error, fused, make
from tests.kd_core.losses.fused import test_loss
from tests.kd_core.losses.fused.on_triton import CpuMatmuls


@pytest.fixture(autouse=True)
def _on_cuda_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(choose_backend.BACKENDS, device, lambda: cuda_backend.CudaBackend)
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_backend, "CudaMatmuls", CpuMatmuls)


@pytest.mark.parametrize("name", ["varying entries", "odd sizes", "all padding"])
@pytest.mark.parametrize(("divergence", "tail"), test_loss.PAIRS)
def test_equals_the_oracle(divergence: str, tail: str, name: str) -> None:
    test_loss.test_equals_the_oracle_in_float64_and_float32(divergence, tail, name)


def test_the_factor_of_a_loss_and_rows_of_padding() -> None:
    case, term = make("odd sizes").to(torch.float64), test_loss.CrossEntropy(label_smoothing=0.1)
    form = LmHeadForm(vocab_size=len(case.weight), soft_cap=5.0)
    case = replace(case, weight=torch.cat([case.weight, torch.randn(3, case.weight.shape[1], dtype=torch.float64)]))
    plain, _ = fused(case, term, head=form)
    doubled, _ = fused(case, term, head=form, factor=2.0)
    assert (plain["weight"][form.vocab_size :] == 0).all()
    assert error(doubled, type(plain)(hidden=2 * plain["hidden"], weight=2 * plain["weight"])) == 0
