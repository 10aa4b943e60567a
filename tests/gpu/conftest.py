"""Devices of the tests in this folder."""

import os

import pytest
import torch


def need_gpu() -> None:
    """Skips a test where there is no GPU, unless KD_TEST_DEVICE says that it is tried on a CPU."""
    if not torch.cuda.is_available() and os.environ.get("KD_TEST_DEVICE") != "cpu":
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Returns each device, so that a CPU shows that the test itself is right."""
    if request.param == "cuda":
        need_gpu()
    return torch.device("cuda" if torch.cuda.is_available() and request.param == "cuda" else "cpu")


@pytest.fixture
def gpu() -> None:
    need_gpu()
