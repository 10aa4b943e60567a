"""The fused loss against a dense float64 oracle: every divergence x tail, values and both gradients, hard inputs."""

import pytest
import torch

from kd_core.losses.compatibility import ALLOWED_DIVERGENCES
from kd_core.losses.fused.cpu_backend import round_
from kd_core.losses.fused.loss import fused_loss
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from tests.kd_core.losses.cases import CASES, Result, error, fused, leaves, make, reference

PAIRS = [(divergence, tail) for tail, divergences in ALLOWED_DIVERGENCES.items() for divergence in divergences]
NUMBERS = {
    "jsd": {"beta": 0.3},
    "skew_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
    "mixed_kl": {"reverse_share": 0.3},
    "adaptive_kl": {"head_mass": 0.6},
    "decoupled_kl": {"head_size": 2, "head_weight": 0.5, "tail_weight": 3.0},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_equals_the_oracle_in_float64_and_float32(divergence: str, tail: str, name: str) -> None:
    numbers = NUMBERS.get(divergence, {})
    term = Distillation(divergence=divergence, tail=tail, **numbers)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        case = make(name).to(dtype)
        found, _ = fused(case, term)
        assert all(value.isfinite().all() for value in found.values())
        assert (found["hidden"][~case.mask] == 0).all()
        assert found["hidden"].dtype == dtype
        assert error(found, reference(case, term, **numbers)) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_cross_entropy_equals_torch(name: str) -> None:
    case = make(name).to(torch.float64)
    hidden, weight = leaves(case)
    logits = torch.where(case.mask[:, None], hidden, 0.0) @ weight.T
    labels = torch.where(case.mask, case.labels, -100)
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    total = total + 0.01 * (logits.logsumexp(dim=1)[case.mask] ** 2).sum()
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    wanted = Result(loss=total.detach(), hidden=hidden.grad, weight=weight.grad)
    found, _ = fused(case, CrossEntropy(label_smoothing=0.1, z_loss=0.01))
    assert error(found, wanted) < 1e-10


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (64, 100)])
def test_rounding_in_place_is_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.randn(shape)
    wanted = values.to(torch.bfloat16)
    found = round_(values, torch.bfloat16)
    assert torch.equal(found, wanted)
    assert found.data_ptr() == values.data_ptr()


def test_terms_add_up_by_their_weights() -> None:
    case = make("plain").to(torch.float64)
    kd, sft = Distillation(weight=0.9), CrossEntropy(weight=0.1)
    both, sums = fused(case, Objective({"kd": kd, "sft": sft}, chunk_tokens=2))
    alone = [fused(case, term)[0] for term in (kd, sft)]
    # A term alone is weighted too.
    assert error(both, Result({name: alone[0][name] + alone[1][name] for name in both})) < 1e-12
    assert float(sums.sums["kd_loss"]) == pytest.approx(float(alone[0]["loss"]) / 0.9, rel=1e-12)


def test_nothing_is_differentiated_where_no_gradient_is_wanted() -> None:
    case = make("plain").to(torch.float64)
    hidden, weight = leaves(case)
    with torch.no_grad():
        found = fused_loss(hidden, weight, case.teacher, case.labels, case.mask, Objective({"kd": Distillation()}))
    assert not found.total.requires_grad
    hidden, weight = leaves(case)
    weight.requires_grad_(False)
    fused_loss(hidden, weight, case.teacher, case.labels, case.mask, Objective({"kd": Distillation()})).total.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_the_scale_is_on_total_and_gradient_but_not_on_the_sums() -> None:
    case, objective = make("odd sizes").to(torch.float64), Objective({"kd": Distillation()}, chunk_tokens=3)
    whole, sums = fused(case, objective)
    hidden, weight = leaves(case)
    found = fused_loss(hidden, weight, case.teacher, case.labels, case.mask, objective, scale=0.125)
    (3 * found.total).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    scaled = Result(loss=3 * found.total.detach(), hidden=hidden.grad, weight=weight.grad)
    assert error(scaled, Result({name: 3 * 0.125 * value for name, value in whole.items()})) < 1e-14
    assert found.sums == sums.sums
