"""Error budgets in float16 and bfloat16: every divergence on every tail, against float64 truth on the rounded inputs.

The yardstick is the dense loss as users write it, logits rounded to the inputs' dtype, with the same formulas on them.
"""

import pytest
import torch

from kd_core.losses.compatibility import ALLOWED_DIVERGENCES
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from tests.kd_core.losses.cases import Case, Result, error, fused, leaves, make, plain, reference
from tests.kd_core.losses.fused.test_loss import NUMBERS, PAIRS
from tests.reference import dense

SIZES = [(33, 257, 8, 64), (64, 1000, 16, 32)]


def rounded_case(size: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    case = plain(*size)
    return Case(case.hidden, case.weight / 4, case.teacher, case.labels, torch.ones(size[0]).bool()).to(dtype)


def as_users_write_it(case: Case, term: Distillation, **numbers: float) -> Result:
    """Logits of a matmul in the inputs' dtype; the oracle's formulas on them in float64, so that only those round."""
    hidden, weight = leaves(case)
    log_q = (hidden @ weight.T).double().log_softmax(dim=1)
    found = dense.positions(log_q, case.teacher[:3], case.labels, case.mask)
    total = sum((dense.position_loss(each, term.divergence, term.tail, **numbers) for each in found), log_q.sum() * 0)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(loss=total.detach(), hidden=hidden.grad, weight=weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_no_worse_than_the_dense_code_of_users(divergence: str, tail: str, dtype: torch.dtype) -> None:
    """Value and both gradients, in norm; what the result's own rounding costs is granted to both."""
    numbers = NUMBERS.get(divergence, {})
    term = Distillation(divergence=divergence, tail=tail, **numbers)
    grain = torch.finfo(dtype).eps / 4
    for size in SIZES[:1] if divergence != "forward_kl" else SIZES:
        case = rounded_case(size, dtype)
        truth, naive = reference(case, term, **numbers), as_users_write_it(case, term, **numbers)
        found, _ = fused(case, term, chunk_tokens=16)
        for name, value in truth.items():
            ours, theirs = ((each[name].double() - value).norm() for each in (found, naive))
            assert ours <= 1.05 * theirs + grain * value.norm(), (name, float(ours / value.norm()))
        # The value has float32 logits of the rounded inputs: nothing else is rounded in it.
        assert float(found["loss"]) == pytest.approx(float(truth["loss"]), rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "varying entries", "sure inside", "sure outside", "one-hot teacher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hard_cases_stay_finite_and_close(name: str, dtype: torch.dtype) -> None:
    """Against the oracle on the same rounded inputs, at the grain of the dtype. Masked positions hold garbage."""
    for tail, divergences in ALLOWED_DIVERGENCES.items():
        for divergence in divergences:
            case, numbers = make(name).to(dtype), NUMBERS.get(divergence, {})
            term = Distillation(divergence=divergence, tail=tail, **numbers)
            found, _ = fused(case, term)
            assert all(value.isfinite().all() for value in found.values()), (divergence, tail)
            assert (found["hidden"][~case.mask] == 0).all()
            assert error(found, reference(case, term, **numbers)) < 2 * torch.finfo(dtype).eps, (divergence, tail)


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "terms", [{"kd": Distillation(), "sft": CrossEntropy(0.1)}, {"kd": Distillation(tail="renormalized")}]
)
def test_autocast_gives_the_inputs_dtype_and_a_float32_loss(
    inputs: torch.dtype, terms: dict[str, Distillation]
) -> None:
    case = rounded_case(SIZES[0], inputs)
    exact, _ = fused(case.to(torch.float64), Objective(terms))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = fused(case, Objective(terms))
    assert found["loss"].dtype == torch.float32
    assert found["weight"].dtype == found["hidden"].dtype == inputs
    for name, value in exact.items():
        assert float((found[name].double() - value).norm()) < 0.01 * float(value.norm())
