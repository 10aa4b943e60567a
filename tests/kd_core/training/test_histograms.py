"""Histograms of tensors that are spread over ranks are those of the whole tensors."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.training.monitoring.histograms import histograms, histograms_of_step
from kd_core.training.step import train_step
from tests.kd_core.parallel.test_layouts import OBJECTIVE, PLAIN, batches, student, tied
from tests.ranks import run_ranks

LAYOUTS = {
    "dp 2": replace(PLAIN, shard="full"),
    "whole copies": replace(PLAIN, shard="none"),
    "tp 2": replace(PLAIN, tensor_parallel=2, sequence_parallel=True),
}


def test_of_one_tensor() -> None:
    torch.manual_seed(0)
    values = torch.randn(1000) * torch.logspace(-16, 4, 1000)
    values[3] = 0.0
    found = histograms({"x": values}, World())["x"]
    assert (found["min"], found["max"]) == (float(values.min()), float(values.max()))
    assert found["num"] == 1000
    assert found["sum"] == pytest.approx(float(values.double().sum()))
    assert found["sum_squares"] == pytest.approx(float(values.double().square().sum()))
    edges = [-np.inf, *found["bucket_limits"]]
    wanted = [int(((values > low) & (values <= high)).sum()) for low, high in pairwise(edges)]
    assert found["bucket_counts"] == wanted


def seen_by_a_step(parallel: Parallel, world: World) -> dict[str, dict[str, Any]]:
    model, laid_out = student(tied, parallel, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with histograms_of_step(model, optimizer, laid_out) as found:
        train_step(
            model, optimizer, batches(0, parallel, laid_out), objective=OBJECTIVE, clip_norm=0.0, parallel=parallel,
            world=laid_out,
        )  # fmt: skip
    before = dict(found)
    train_step(
        model, optimizer, batches(1, parallel, laid_out), objective=OBJECTIVE, clip_norm=0.0, parallel=parallel,
        world=laid_out,
    )  # fmt: skip
    assert found == before  # nobody looks any longer
    return found


def on_ranks(world: World) -> None:
    wanted = seen_by_a_step(PLAIN, World())
    assert {"parameters/norm.weight", "gradients/layers.0.self_attn.q_proj.weight"} <= wanted.keys()
    for name, parallel in LAYOUTS.items():
        found = seen_by_a_step(parallel, world)
        assert found.keys() == wanted.keys()
        for key, each in wanted.items():
            for number in ("num", "min", "max", "sum_squares"):
                assert found[key][number] == pytest.approx(each[number], rel=1e-4, abs=1e-9), (name, key, number)
            if key.startswith("parameters/"):
                assert found[key]["bucket_counts"] == each["bucket_counts"], (name, key)
                assert found[key]["bucket_limits"] == each["bucket_limits"], (name, key)


def test_of_parts_on_ranks() -> None:
    run_ranks(2, on_ranks)
