"""What a rank holds in a step, counted by hand, and seen on two ranks: gradients and weights that stay gathered."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd_core.losses.fused.loss import LossSums
from kd_core.parallel.engine import accumulate_gradients
from kd_core.parallel.layout import Layout, ParameterFacts, RankHolding, holding_of_fullest_rank
from kd_core.parallel.parallelize import bytes_of_a_step
from kd_core.parallel.world import World
from kd_core.training.step import batch_loss
from kd_core.types import Batch
from tests.kd_core.parallel.test_layouts import OBJECTIVE, PLAIN, batches, student, tied
from tests.ranks import run_ranks

FACTS = [
    ParameterFacts((10, 4), 0, None, True),  # an embedding, divided by rows over tensor-parallel ranks
    ParameterFacts((8, 4), 0, 0, True),
    ParameterFacts((4, 8), 1, 0, False),
    ParameterFacts((4,), None, 0, True),
    ParameterFacts((6, 4), 0, 1, True),
]


def test_what_the_fullest_rank_holds() -> None:
    # Two tensor-parallel ranks have 5 × 4 | 4 × 4 + 4 × 4 + 4 | 3 × 4. Three shards of dimension 0 of those:
    # 2 × 4 | 2 × 4 + 2 × 4 + 2 | 1 × 4.
    held = holding_of_fullest_rank(Layout(1, 3, 2), FACTS)
    assert held == RankHolding(
        parameters=30, trained=22, block_numbers=48, largest_block=36, root_numbers=20, gathered_trained=52
    )
    full, gradients = replace(PLAIN, shard="full"), PLAIN
    layout, half = Layout(1, 3, 2), torch.bfloat16
    assert bytes_of_a_step(held, layout, full, 5, half) == (4 * 22, 2 * 48 + 4 * 20)
    assert bytes_of_a_step(held, layout, gradients, 5, half) == (4 * 52, 2 * 48 + 4 * 20)
    assert bytes_of_a_step(held, layout, gradients, 1, half) == (4 * 22, 2 * 48 + 4 * 20)
    many = replace(held, block_numbers=20 * 36)
    assert bytes_of_a_step(many, layout, full, 1, torch.float32) == (4 * 22, 4 * 2 * 36 + 4 * 20)
    alone = holding_of_fullest_rank(Layout(), FACTS)
    assert bytes_of_a_step(alone, Layout(), full, 5, half) == (4 * alone.trained, 2 * alone.parameters)
    assert bytes_of_a_step(alone, Layout(), full, 5, torch.float32) == (4 * alone.trained, 0)


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


def between_passes(world: World, shard: str) -> None:
    """Looks at the parameters at the beginning of each of four passes, and counts collectives."""
    parallel = replace(PLAIN, shard=shard, micro_batch_rows=1)
    model, world = student(tied, parallel, world)
    weight, root = "layers.0.mlp.up_proj.weight", "embed_tokens.weight"
    seen: list[tuple[bool, bool, bool]] = []

    def look(batch: Batch) -> LossSums:
        parameters = dict(model.named_parameters())
        kinds = (isinstance(parameters[name], DTensor) for name in (weight, root))
        seen.append((*kinds, parameters[weight].grad is not None))
        return batch_loss(model, batch, OBJECTIVE, 1.0)

    with Collectives() as collectives:
        accumulate_gradients(model, batches(0, parallel, world), look, parallel, world)
    # (the block is sharded, the root is sharded, this rank has its shard of the gradients)
    assert seen[0] == (True, True, False)
    assert seen[1:] == [(True, False, True) if shard == "full" else (False, False, seen[1][2])] * 3
    groups = len(model.layers) + 1
    # Of four passes of full sharding, each gathers all blocks twice, and the first one the root. Each reduces all.
    gathers, reductions = (4 * 2 * (groups - 1) + 1, 4 * groups) if shard == "full" else (groups, groups)
    assert collectives.counts == {"_allgather_base_": gathers, "_reduce_scatter_base_": reductions}
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("shard", ["full", "gradients"])
def test_passes_of_a_step_on_two_ranks(shard: str) -> None:
    run_ranks(2, between_passes, shard)
