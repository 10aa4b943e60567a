"""A run that is far slower than its matmuls says so once, with the cause."""

import logging
from collections.abc import Generator

import pytest
import torch
from torch import nn

from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.precision import bfloat16_support
from kd_core.training.monitoring.slow_start import SlowStart, flops_per_token

PARAMETERS, POSITIONS = 1_000_000, 1_000
HOURS = 10_000.0


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Generator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="kd"):
        yield caplog


def _watch(precision: str = "float32") -> SlowStart:
    model = nn.Linear(1000, 1000, bias=False)
    return SlowStart(model, Parallel(precision=precision), World(), steps=3)  # type: ignore[arg-type]


def test_operations_of_a_token() -> None:
    layers = nn.Sequential(nn.Linear(10, 5, bias=False), nn.Linear(5, 10, bias=False))
    layers[0].requires_grad_(False)
    assert flops_per_token(layers.parameters()) == 6 * 50 + 4 * 50


def _add_twice(watch: SlowStart, positions: int, seconds: float, waited: float) -> None:
    for _ in range(2):
        watch.add(positions, seconds, waited)


def test_a_step_that_costs_what_it_should_says_nothing(said: pytest.LogCaptureFixture) -> None:
    _add_twice(_watch(), POSITIONS, seconds=0.9, waited=0.0)
    # At 10 TFLOP/s, more than any CPU reaches, this many positions take a second in themselves.
    _add_twice(_watch(), 10**13 // (6 * PARAMETERS), seconds=3.9, waited=0.0)
    assert not said.text


def test_one_slow_first_step_says_nothing(said: pytest.LogCaptureFixture) -> None:
    watch = _watch()
    for seconds in (HOURS, 0.9, HOURS):
        watch.add(POSITIONS, seconds, waited=0.0)
    assert not said.text


def test_a_slow_step_is_said_once_with_what_is_left(said: pytest.LogCaptureFixture) -> None:
    watch = _watch()
    for _ in range(5):
        watch.add(POSITIONS, seconds=60.0, waited=0.0)
    assert said.text.count("slow: a step takes 60.0 s") == 1
    assert "the steps that are left take 60 s." in said.text
    _add_twice(_watch(), POSITIONS, seconds=300.0, waited=0.0)
    assert "the steps that are left take 5 min." in said.text


def test_waiting_for_data_is_named(said: pytest.LogCaptureFixture) -> None:
    _add_twice(_watch(), POSITIONS, seconds=1.0, waited=HOURS)
    assert "spent waiting for data" in said.text


def test_emulated_bfloat16_is_named_where_it_is_emulated(said: pytest.LogCaptureFixture) -> None:
    _add_twice(_watch("bfloat16"), POSITIONS, seconds=HOURS, waited=0.0)
    emulated = not bfloat16_support(torch.device("cpu")).is_fast
    assert ("--config=parallel.precision=float32" in said.text) == emulated
