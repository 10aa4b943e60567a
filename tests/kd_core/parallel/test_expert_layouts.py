"""A student with experts and its router losses in any layout: losses and gradients are those of one process."""

from dataclasses import replace

import pytest

from kd_core.errors import UsageError
from kd_core.losses.objective import Auxiliary, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.layout import StudentSizes, check_divisible
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import ExpertSettings
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.families.registry import family_decoder
from tests.kd_core.parallel import test_layouts
from tests.kd_core.parallel.test_layouts import ARCH, OBJECTIVE, OF_FOUR, OF_TWO, PLAIN, compare
from tests.ranks import run_ranks

ROUTED = Objective(
    {
        **OBJECTIVE.terms,
        "balance": Auxiliary(weight=0.1, name="router_balance"),
        "z": Auxiliary(weight=0.01, name="router_z"),
    },
    chunk_tokens=7,
)
# Layers of experts beside a dense one, and windows.
EXPERTS = replace(
    ARCH,
    experts=ExpertSettings(count=4, per_token=2, size=12, normalised=False),
    dense_layers=(1,),
    num_layers=3,
    qk_norm=True,
    windows=(4, 4, 4),
    family="qwen3_moe",
)


def with_experts() -> Decoder:
    return family_decoder(EXPERTS)


def compare_routed(world: World, layouts: dict[str, Parallel]) -> None:
    test_layouts.OBJECTIVE = ROUTED
    compare(world, with_experts, layouts)


def test_two_ranks_train_as_one() -> None:
    """Rows divided, also by position, and experts divided, where recomputation counts no value twice."""
    layouts = {name: replace(OF_TWO[name], recompute="full") for name in ("dp 2", "tp 2, by position", "cp 2")}
    run_ranks(2, compare_routed, layouts)


@pytest.mark.slow
def test_more_ranks_train_as_one() -> None:
    run_ranks(2, compare_routed, OF_TWO)
    names = ("dp 2 × tp 2", "dp 2 × tp 2, by position, recomputed", "hybrid", "tp 4, kv heads repeated")
    run_ranks(4, compare_routed, {name: OF_FOUR[name] for name in names})


@pytest.mark.slow
def test_compiled_blocks() -> None:
    """A loop over documents and one over experts are outside of the graphs, as on any CPU."""
    run_ranks(1, compare_routed, {"alone": replace(PLAIN, compile=True)})
    run_ranks(2, compare_routed, {"tp 2": replace(OF_TWO["tp 2"], compile=True, recompute="full")})


def test_experts_that_ranks_cannot_share_are_refused() -> None:
    sizes = StudentSizes.from_architecture(replace(EXPERTS, dense_layers=()), row_length=12)
    check_divisible(4, sequence_parallel=False, shape=sizes)
    odd = replace(EXPERTS, experts=ExpertSettings(count=3, per_token=2))
    with pytest.raises(UsageError, match=r"3 experts, or leaves .* Fitting: 1\."):
        check_divisible(2, sequence_parallel=False, shape=StudentSizes.from_architecture(odd, row_length=12))
