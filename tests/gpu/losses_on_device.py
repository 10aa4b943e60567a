"""A pytest plugin: the tests of the losses, unchanged, with the fused loss on another device.

    python -m pytest -p tests.gpu.losses_on_device -m gpu tests/kd_core/losses -o filterwarnings=

Inputs, the float64 oracle and gradients stay on the CPU. The loss is computed on the device, and autograd carries its
gradients back. KD_TEST_DEVICE names the device (cuda). The tests of losses get the mark `gpu`.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("KD_TEST_DEVICE", "cuda"))
# They start processes of their own, which have no plugin, count compiled graphs, or switch autocast of the CPU on.
ELSEWHERE = ("test_vocab_shard.py", "test_composition.py", "autocast")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "kd_core/losses" in item.nodeid and not any(word in item.nodeid for word in ELSEWHERE):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def losses_on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces `fused_loss` in the tests' modules by one that moves its inputs to the device and its sums back."""
    from kd_core.losses.fused.choose_backend import backend_of  # noqa: PLC0415
    from kd_core.losses.fused.loss import LossSums, fused_loss  # noqa: PLC0415 (after the import hook of conftest.py)
    from tests.kd_core.losses import cases  # noqa: PLC0415

    def moved(value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    def on_device(hidden: Tensor, weight: Tensor, teacher: Any, *targets: Any, **options: Any) -> LossSums:
        form = options.get("form")
        if form is not None and form.bias is not None:
            options["form"] = replace(form, bias=form.bias.to(DEVICE))
        sums = fused_loss(
            moved(hidden), moved(weight), teacher.map(moved), *map(moved, targets),
            **{name: moved(value) for name, value in options.items()},
        )  # fmt: skip
        return LossSums(sums.total.cpu(), {name: value.cpu() for name, value in sums.sums.items()})

    # The tests' vocabularies are so small that a GPU would never take the pass over the support.
    monkeypatch.setattr(backend_of(torch.empty(0, device=DEVICE)), "support_is_cheaper", staticmethod(lambda *_: True))
    for module in (cases, request.module):
        if getattr(module, "fused_loss", None) is not None:
            monkeypatch.setattr(module, "fused_loss", on_device)
