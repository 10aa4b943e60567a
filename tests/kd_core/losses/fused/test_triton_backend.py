"""The Triton kernels against float64: the loss's own tests through them, and each of their numbers on random rows."""

import importlib
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.parallel.world import World
from tests.kd_core.losses.cases import CASES, error, fused, make
from tests.kd_core.losses.fused import test_loss, test_loss_precision, test_vocab_shard
from tests.kd_core.losses.fused.on_triton import _on_triton, use_triton  # noqa: F401 (the fixture of all tests here)

# Collected here once more, where the fixture takes them through the kernels.
from tests.kd_core.losses.fused.test_loss import (  # noqa: F401
    test_cross_entropy_equals_torch,
    test_nothing_is_differentiated_where_no_gradient_is_wanted,
    test_terms_add_up_by_their_weights,
    test_the_scale_is_on_total_and_gradient_but_not_on_the_sums,
)
from tests.kd_core.losses.test_properties import test_repeated_ids_count_once_in_the_students_mass_and_gradient  # noqa: F401
from tests.kd_core.losses.test_terms import (  # noqa: F401
    test_heads_with_scale_bias_cap_and_padding,
    test_metrics_are_what_the_dense_distributions_say,
    test_selection_keeps_the_most_uncertain_share_of_scored_positions,
    test_temperatures_apart_multiply_and_other_terms_keep_their_own,
)
from tests.ranks import run_ranks

pytest.importorskip("triton")
logit_operators = importlib.import_module("kd_core.kernels.logit_operators")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here: see tests/gpu")


def _mostly_slow(cases: list[tuple[str, ...]], kept: int) -> list[object]:
    """Mark all but one case in `kept` as slow."""
    return [pytest.param(*case, marks=pytest.mark.slow if (i + 1) % kept else ()) for i, case in enumerate(cases)]


PAIRS_OF_CASES = [(*pair, name) for pair, name in itertools.product(test_loss.PAIRS, CASES)]


@pytest.mark.parametrize(("divergence", "tail", "name"), _mostly_slow(PAIRS_OF_CASES, 3))
def test_equals_the_oracle(divergence: str, tail: str, name: str) -> None:
    test_loss.test_equals_the_oracle_in_float64_and_float32(divergence, tail, name)


@pytest.mark.parametrize(("divergence", "tail"), _mostly_slow(test_loss.PAIRS, 25))
def test_rounded_in_its_own_memory_it_is_no_worse_than_the_dense_code_of_users(
    divergence: str, tail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16, since Triton's interpreter has no bfloat16."""
    monkeypatch.setattr(logit_operators, "BLOCK", 128)  # of vocabularies of 257 and 1,000
    test_loss_precision.test_no_worse_than_the_dense_code_of_users(divergence, tail, torch.float16)


def _shards_through_kernels(world: World, names: tuple[str, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_triton(patch)
        test_vocab_shard.other_objectives(world, names)


def _padding_through_kernels(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_triton(patch)
        test_vocab_shard.ranks_of_padding(world)


@pytest.mark.parametrize(
    "names", [("varying entries",), pytest.param(test_vocab_shard.SOME_CASES, marks=pytest.mark.slow)]
)
def test_shards_of_the_vocabulary_have_the_loss_and_gradients_of_one_process(names: tuple[str, ...]) -> None:
    run_ranks(2, _shards_through_kernels, names)


@pytest.mark.slow
def test_ranks_that_hold_padding_alone_take_no_probability() -> None:
    run_ranks(4, _padding_through_kernels)


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_a_factor_on_the_loss_is_one_on_the_gradients(factor: float) -> None:
    case = make("odd sizes").to(torch.float64)
    objective = Objective({"kd": Distillation(), "sft": CrossEntropy(0.1)}, chunk_tokens=3)
    plain, _ = fused(case, objective)
    scaled, _ = fused(case, objective, factor=factor)
    assert error(scaled, type(plain)(**{name: factor * plain[name] for name in ("hidden", "weight")})) < 1e-12


@pytest.mark.parametrize("V", [1, 7, 8, 9, 37])
@pytest.mark.parametrize("T", [1, 2, 3])
def test_statistics_of_a_row_are_those_of_float64(V: int, T: int) -> None:
    torch.manual_seed(V)
    product = 30 * torch.randn(5, V, dtype=torch.float64)
    # A row of all support, one with a single logit left, one that is far from 0.
    product[0], product[1, 1:], product[2] = -torch.inf, -torch.inf, product[2] + 1e4
    inverse, form = torch.tensor([1.0, 0.5, 3.0][:T]).double(), torch.tensor([1.0, 0.0]).double()
    top, mass, total, spread = logit_operators.reduce_tail(product, inverse, form, None, False, True, T == 1)
    assert torch.equal(top, product.amax(dim=1))
    for row in range(1, 5):
        z = product[row][product[row] > -torch.inf]
        assert float(total[row]) == pytest.approx(float(z.sum()), rel=1e-12)
        for t, factor in enumerate(inverse):
            assert float(mass[t, row]) == pytest.approx(float(((z - z.max()) * factor).exp().sum()), rel=1e-12)
        if T == 1:
            wanted = torch.distributions.Categorical(logits=z - z.max()).entropy()
            entropy = mass[0, row].log() + spread[row] / mass[0, row]
            assert float(entropy) == pytest.approx(float(wanted), rel=1e-12, abs=1e-14)
    assert (mass[:, 0] == 1).all()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_kernels_compiled_for_sm_90_fit_into_registers() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.kernel_resources"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    print(done.stdout)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {"mark_support", "reduce_tail", "write_dlogits"}
    assert [row for row in rows if row["spilled_bytes"]] == []
    # The interpreter runs one program after another, so only these say that a store waits for the loads before it.
    barriers = {(row["kernel"], row["barriers"]) for row in rows}
    assert barriers == {("mark_support", 3), ("write_dlogits", 2), ("reduce_tail", 0)}


@pytest.mark.parametrize("n", [0, 1, 4])
def test_operators_are_what_they_say_to_torch(n: int) -> None:
    """Their fake results, mutated arguments and aliases, as compiled graphs and fake tensors rely on them."""
    torch.manual_seed(n)
    product, bias, form = torch.randn(n, 16)[:, :11], torch.randn(11), torch.tensor([0.5, 3.0])
    columns, in_shard = torch.randint(11, (n, 4)), torch.rand(n, 4) > 0.3
    logits, slots = logit_operators.mark_support(product.clone(), columns, in_shard, form, bias, True)
    inverse, offset = torch.ones(1), torch.randn(n)
    top, mass, *_ = logit_operators.reduce_tail(product, inverse, form, bias, True, True, True)
    gradient = (inverse, form, bias, True, top, mass, offset, columns, slots, logits, logits, torch.float16)
    for operator, arguments in (
        (logit_operators.mark_support, (product.clone(), columns, in_shard, form, bias, True)),
        (logit_operators.reduce_tail, (product, inverse, form, bias, True, True, True)),
        (logit_operators.write_dlogits, (torch.zeros(n, 16)[:, :11], *gradient)),
        (logit_operators.scale_unless_one, (torch.randn(n, 3), torch.tensor(2.0))),
    ):
        torch.library.opcheck(operator, arguments)
