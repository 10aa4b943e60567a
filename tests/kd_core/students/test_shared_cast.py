"""One cast for the linear layers behind a norm: the bits of autocast's own casts, with fewer of them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.students.decoder import attention, transformer_block
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from kd_core.students.student import allocate
from tests.kd_core.parallel.test_layouts import adapted, student, tied, trajectory
from tests.kd_core.students.test_packed_attention import ARCH, PACKINGS
from tests.ranks import run_ranks


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def no_shared_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every reader the float32 values, which autocast then casts for each."""
    for module in (attention, transformer_block):
        monkeypatch.setattr(module, "cast_once", lambda x, *readers: (x,) * len(readers))


def passes(model: Decoder) -> tuple[list[Tensor], Counter[str]]:
    """Hidden states and gradients, and the operations of both passes."""
    ids = torch.tensor(PACKINGS["packed"])
    model.zero_grad()
    with Operations() as operations:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(ids % 51, torch.arange(40).expand(2, 40), ids, lambda hidden, _: hidden)
        hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], operations.counts


def test_one_cast_has_the_bits_of_a_cast_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = allocate(meta_decoder(ARCH), torch.device("cpu"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    once, few = passes(model)
    no_shared_cast(monkeypatch)
    each, many = passes(model)
    assert len(once) == 25  # hidden states, 11 parameters a layer, and 2
    for one, other in zip(once, each, strict=True):
        assert torch.equal(one, other)
    # In a layer, 2 casts in place of 5 forward, and of 5 backward: the other gradients are added as they are.
    assert many["_to_copy"] - few["_to_copy"] == 6 * ARCH.num_layers


def same_trajectories(world: World, make: Callable[[], Decoder]) -> None:
    patch = pytest.MonkeyPatch()
    layouts = {
        "alone": Parallel(precision="bfloat16", micro_batch_rows=2),
        "tp": Parallel(precision="bfloat16", tensor_parallel=2, micro_batch_rows=2),
        "shards": Parallel(precision="bfloat16", shard="full", recompute="full", micro_batch_rows=2),
    }

    def losses(name: str) -> list[float]:
        model, laid_out = student(make, layouts[name], World() if name == "alone" else world)
        return trajectory(model, layouts[name], laid_out)

    once = {name: losses(name) for name in layouts}
    no_shared_cast(patch)
    assert once == {name: losses(name) for name in layouts}


def test_layouts_have_the_same_bits_too() -> None:
    run_ranks(2, same_trajectories, tied)
    run_ranks(2, same_trajectories, adapted)
