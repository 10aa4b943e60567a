"""Budgets of activations: no bit of a gradient changes, the memory fits, and the dearest outputs are kept."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import kd_core.parallel.recompute as plans
from kd_core.errors import UsageError
from kd_core.parallel.config import Parallel
from kd_core.parallel.engine import accumulate_gradients
from kd_core.parallel.recompute import BlockCosts, Cost, choose_kept, measure_block
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import ExpertSettings
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from kd_core.students.families.registry import family_decoder
from kd_core.training.step import batch_loss
from tests.kd_core.parallel.test_expert_layouts import EXPERTS, ROUTED, with_experts
from tests.kd_core.parallel.test_layouts import (
    ARCH,
    OBJECTIVE,
    OF_TWO,
    PLAIN,
    ROWS,
    adapted,
    compare,
    rows_of,
    student,
    tied,
)  # fmt: skip
from tests.ranks import run_ranks

BUDGETS = ("budget:0.05", "budget:0.3", "budget:.6", "budget:0.95")


def _gradients(make: Callable[[], Decoder], parallel: Parallel) -> dict[str, Tensor]:
    model, world = student(make, parallel, World())
    for _ in range(2):  # the first pass makes the plan, the second one follows it
        model.zero_grad()
        torch.manual_seed(0)
        loss_of = partial(batch_loss, model, objective=ROUTED if make is with_experts else OBJECTIVE, scale=0.01)
        accumulate_gradients(model, [rows_of(0, range(ROWS))], loss_of, parallel, world)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _dropping() -> Decoder:
    model = adapted()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout.p = 0.5
    return model


def _capped() -> Decoder:
    """Most documents are shorter than a head is wide, so products of queries and keys are dear for their bytes."""
    return family_decoder(replace(ARCH, head_dim=16, attention_soft_cap=1.0, windows=(4, None), family="gemma2"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tied, _dropping, with_experts, _capped])
def test_gradients_have_the_same_bits(make: Callable[[], Decoder], precision: str) -> None:
    parallel = replace(PLAIN, precision=precision)
    wanted = _gradients(make, parallel)
    for recompute in BUDGETS:
        found = _gradients(make, replace(parallel, recompute=recompute))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items()), recompute


WIDE = replace(
    ARCH, hidden_size=64, intermediate_size=192, head_dim=16, num_layers=8, num_kv_heads=4, padded_vocab_size=None
)


def _kept_bytes(recompute: str) -> int:
    """What the allocator has given and not got back behind the blocks, by the profiler."""
    model, _ = student(lambda: meta_decoder(WIDE), replace(PLAIN, recompute=recompute), World())
    x, positions = torch.randn(2, 64, 64, requires_grad=True), torch.arange(64).expand(2, 64)
    context = model.context(positions, None)

    def blocks() -> Tensor:
        hidden = x
        for layer in range(len(model.layers)):
            hidden = model.run_block(layer, hidden, context)
        return hidden

    blocks()
    with profile(profile_memory=True) as profiled:
        output = blocks()
    size = sum(event.self_cpu_memory_usage for event in profiled.events())
    assert output.requires_grad
    return size


def test_memory_is_within_the_budget_and_uses_it() -> None:
    whole, least = _kept_bytes("none"), _kept_bytes("full")
    assert least < 0.15 * whole
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        found = _kept_bytes(f"budget:{share}") / whole
        assert share - 0.06 < found < share + 0.01, (share, found)


def test_products_are_counted_as_written_down() -> None:
    """Of a block by hand: 4 D² of projections, T for each output of attention, 2 D I of the feed-forward."""
    model, _ = student(lambda: meta_decoder(WIDE), PLAIN, World())
    positions = torch.arange(64).expand(2, 64)
    context = model.context(positions, None)
    costs = measure_block(model.layers[0].run, torch.randn(2, 64, 64), *context.angles[0], context.documents)
    N, D, inner = 128, 64, 192
    found = {name.split(".")[1]: 0 for name, _ in costs.operations}
    for (name, _), cost in costs.operations.items():
        found[name.split(".")[1]] += cost.products
    assert found.pop("mm") == N * (4 * D * D + 2 * D * inner)  # down's output is not needed again
    assert list(found.values()) == [N * D * 64]
    assert costs.input_bytes == 4 * N * D


class _Products(TorchDispatchMode):
    """Records the bytes of each matmul's output, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.sizes.append(output.nbytes)
        return output


def test_products_are_numbered_alike_where_experts_have_no_rows() -> None:
    """Experts without a kernel (here of 6 channels) are multiplied in turn, and the first one is empty."""
    arch = replace(EXPERTS, experts=ExpertSettings(count=4, per_token=1, size=6), dense_layers=())
    model, _ = student(lambda: family_decoder(arch), PLAIN, World())
    x, positions = torch.rand(2, 12, 16), torch.arange(12).expand(2, 12)
    context = model.context(positions, None)
    with torch.no_grad():
        model.layers[0].mlp.router.weight[0] = 0  # no logit is below those of the others
        model.layers[0].mlp.router.weight[1:].abs_()
    arguments = (*context.angles[0], context.documents)
    costs = measure_block(model.layers[0].run, x, *arguments)
    with _Products() as products:
        model.layers[0].run(x, *arguments)
    assert 0 in products.sizes
    sizes = {number: cost.bytes for (name, number), cost in costs.operations.items() if name == "aten.mm.default"}
    assert len(sizes) > 6
    assert sizes == {number: products.sizes[number] for number in sizes}


A, B = ("a", 0), ("b", 0)


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (0.1, [set(), set()]),  # inputs alone
        (0.2, [{B}, set()]),  # 40 bytes: 20 of inputs, and b is the dearer a byte
        (0.3, [{B}, {B}]),
        (0.5, [{A, B}, {B}]),
        (0.9, [None, {A, B}]),  # 60 of the 180 are left behind all products
        (1.0, [None, None]),
    ],
)
def test_the_dearest_a_byte_are_kept_first(share: float, wanted: list[set[tuple[str, int]] | None]) -> None:
    costs = BlockCosts(100, 10, {A: Cost(300, 30), B: Cost(400, 20)})
    assert choose_kept(costs, share, 2) == wanted


def test_shared_by_two_ranks_it_is_that_of_one_process() -> None:
    layouts = {
        "dp 2": replace(OF_TWO["dp 2"], recompute="budget:0.4"),
        "tp 2, by position": replace(OF_TWO["tp 2, by position"], recompute="budget:0.6"),
        "cp 2": replace(OF_TWO["cp 2"], recompute="budget:0.5"),
    }
    run_ranks(2, compare, tied, layouts)


def _follow_the_first_rank(world: World) -> None:
    plans.choose_kept = lambda *_: [None if world.rank else frozenset()] * 2
    model, laid_out = student(tied, replace(PLAIN, context_parallel=2, recompute="budget:0.5"), world)
    rows = rows_of(0, range(2)).divided(laid_out.row_share)
    batch_loss(model, rows, OBJECTIVE, 0.01).total.backward()  # hangs where one rank alone gathers keys again
    assert _plan(model) == {0: frozenset(), 1: frozenset()}


def test_ranks_of_unlike_costs_follow_one_plan() -> None:
    run_ranks(2, _follow_the_first_rank)


def _plan(model: Decoder) -> dict[int, plans.Outputs]:
    return model.layers[0].recompute.func.__self__.plan  # type: ignore[union-attr]


def test_each_kind_of_block_has_a_plan() -> None:
    """A block of experts, and one without: the products of one are not those of the other."""
    model, _ = student(with_experts, replace(PLAIN, recompute="budget:0.5"), World())
    batch_loss(model, rows_of(0, range(ROWS)), ROUTED, 0.01).total.backward()
    plan = _plan(model)
    names = [{name for name, _ in plan[number] or ()} for number in (0, 1)]
    assert "aten._grouped_mm.default" in names[0] ^ names[1], names


@pytest.mark.slow
def test_compiled_blocks_have_the_compilers_budget() -> None:
    run_ranks(1, compare, tied, {"alone": replace(PLAIN, compile=True, recompute="budget:0.3")})


@pytest.mark.parametrize("recompute", ["budget:0", "budget:1", "budget:", "budget:0.0", "budget:-.5", "budget:1e-1"])
def test_other_budgets_are_refused(recompute: str) -> None:
    with pytest.raises(UsageError, match="parallel.recompute: got .*budget:S with 0 < S < 1"):
        Parallel(recompute=recompute)
