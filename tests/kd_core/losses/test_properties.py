"""What holds for every input, by hypothesis: signs, zeros, bounds, and that the order of things does not matter."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_core.losses.divergences import Parameters, jsd, log_mixture
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.losses.sparse_view import make_events
from kd_core.types import TeacherTopK
from tests.kd_core.losses.cases import Case, Result, error, fused, plain, random_teacher

ALWAYS_POSITIVE = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "mixed_kl", "adaptive_kl"]
PROMISE_ZERO = [*ALWAYS_POSITIVE, "total_variation", "decoupled_kl"]
quick = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random distributions of random sizes and sharpness; every position scored."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    v = draw(st.integers(2, 24))
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, v))
    case = plain(n, v, k, draw(st.integers(1, 7)), spread=draw(st.floats(0.0, 8.0)))
    return replace(case, mask=torch.ones(n).bool())


def entries(case: Case, pick: "object") -> Case:
    """The case with its entries indexed along K."""
    return replace(
        case, teacher=TeacherTopK(case.teacher.ids[:, pick], case.teacher.log_probs[:, pick], case.teacher[2])
    )


def rows(case: Case, pick: slice) -> Case:
    teacher = TeacherTopK(*(field[pick] for field in case.teacher[:3]))
    return Case(case.hidden[pick], case.weight, teacher, case.labels[pick], case.mask[pick])


def taught_by_itself(case: Case, k: int) -> Case:
    """The teacher's entries are the student's own."""
    ranked, ids = (case.hidden @ case.weight.T).log_softmax(dim=1).sort(dim=1, descending=True)
    tail = ranked[:, k:].logsumexp(dim=1)
    return replace(case, teacher=TeacherTopK(ids[:, :k], ranked[:, :k], tail))


@quick
@given(cases())
def test_divergences_are_not_negative(case: Case) -> None:
    for tail in ("tail_bucket", "renormalized"):
        for divergence in ALWAYS_POSITIVE:
            found, _ = fused(case, Distillation(divergence=divergence, tail=tail))
            assert float(found["loss"]) > -1e-12


@quick
@given(cases(), st.sampled_from(["tail_bucket", "renormalized"]))
def test_a_student_that_equals_its_teacher_pays_nothing_and_stays(case: Case, tail: str) -> None:
    case = taught_by_itself(case, max(1, len(case.weight) // 3))
    for divergence in PROMISE_ZERO:
        if divergence == "decoupled_kl" and tail == "renormalized":
            continue
        found, _ = fused(case, Distillation(divergence=divergence, tail=tail))
        # |p − q| has a slope of ±½ wherever rounding leaves a difference, so TV promises the value alone.
        checked = ("loss",) if divergence == "total_variation" else ("loss", "hidden", "weight")
        for name in checked:
            assert float(found[name].abs().max()) < 1e-10, (divergence, name)


def test_those_that_do_not_promise_it_do_move_such_a_student() -> None:
    torch.manual_seed(0)
    case = taught_by_itself(plain(), 4)
    for tail in ("truncated", "residual_to_label", "uniform_tail"):
        found, _ = fused(case, Distillation(tail=tail))
        assert float(found["hidden"].abs().max()) > 1e-3, tail
    # Without a tail term the gradient is right only as far as the sum of the entries is 1.
    found, _ = fused(case, Distillation(tail="unnormalized"))
    assert float(found["loss"]) == pytest.approx(0, abs=1e-12)
    assert float(found["hidden"].abs().max()) > 1e-3


@quick
@given(cases())
def test_the_tail_bucket_is_a_lower_bound_that_grows_with_k_to_the_full_divergence(case: Case) -> None:
    n, v = len(case.hidden), len(case.weight)
    full = random_teacher(n, v, v)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "total_variation"):
        values = []
        for k in range(1, v + 1):
            tail = full.log_probs[:, k:].logsumexp(dim=1) if k < v else torch.full((n,), -torch.inf).double()
            teacher = TeacherTopK(full.ids[:, :k], full.log_probs[:, :k], tail)
            values.append(float(fused(replace(case, teacher=teacher), Distillation(divergence=divergence))[0]["loss"]))
        assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))
        assert values[-2] == pytest.approx(values[-1], abs=1e-10)  # a tail of one token is that token


@quick
@given(cases(), st.data())
def test_the_order_of_entries_and_positions_does_not_matter(case: Case, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(case.teacher.ids.shape[1])))
    permuted = data.draw(st.permutations(range(len(case.hidden))))
    for term in (Distillation(divergence="jsd"), Distillation(tail="residual_to_label")):
        found, _ = fused(case, term)
        assert error(fused(entries(case, order), term)[0], found) < 1e-11
        moved, _ = fused(rows(case, permuted), term)  # type: ignore[arg-type]
        assert error(Result(weight=moved["weight"]), Result(weight=found["weight"])) < 1e-11


@quick
@given(cases(), st.data())
def test_chunks_micro_batches_and_masked_rows_change_nothing(case: Case, data: st.DataObject) -> None:
    objective = Objective({"kd": Distillation(weight=0.7), "sft": CrossEntropy(0.3, z_loss=0.1)}, chunk_tokens=100)
    whole, sums = fused(case, objective)
    chunked, _ = fused(case, replace(objective, chunk_tokens=data.draw(st.integers(1, 5))))
    assert error(chunked, whole) < 1e-11
    cut = data.draw(st.integers(0, len(case.hidden)))
    parts = [fused(rows(case, pick), objective) for pick in (slice(0, cut), slice(cut, None))]
    added = Result({name: parts[0][0][name] + parts[1][0][name] for name in ("loss", "weight")})
    assert error(added, Result(loss=whole["loss"], weight=whole["weight"])) < 1e-11
    for name, value in sums.sums.items():
        assert float(parts[0][1].sums[name] + parts[1][1].sums[name]) == pytest.approx(float(value), abs=1e-10)
    twice = rows(case, [*range(len(case.hidden)), *range(len(case.hidden))])  # type: ignore[arg-type]
    padded, _ = fused(replace(twice, mask=torch.arange(len(twice.mask)) < len(case.mask)), objective)
    assert (
        error(Result(loss=padded["loss"], weight=padded["weight"]), Result(loss=whole["loss"], weight=whole["weight"]))
        < 1e-11
    )


@quick
@given(st.floats(1e-9, 1 - 1e-9), st.floats(-2e4, 2e4))
def test_log_mixture_is_exact_in_float32_near_0_and_finite_far_from_it(share: float, ratio: float) -> None:
    at = torch.tensor([ratio]).requires_grad_()
    found = log_mixture(at, share)
    found.sum().backward()
    exact = at.detach().double()
    wanted = math.log1p(share * math.expm1(float(exact))) if abs(ratio) < 30 else None
    if wanted is not None:
        assert float(found.detach()) == pytest.approx(wanted, rel=1e-5, abs=1e-12)
    assert at.grad is not None
    assert at.grad.isfinite().all()
    assert -1e-6 <= float(at.grad) <= 1 + 1e-6


@pytest.mark.parametrize(("end", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_is_continuous_at_both_ends(end: float, limit: str) -> None:
    torch.manual_seed(1)
    case = plain(k=6)
    case = replace(case, hidden=case.hidden / 3).to(torch.float32)  # the rate grows with the largest p / q
    wanted, _ = fused(case, Distillation(divergence=limit))
    for step in (1e-3, 1e-5, 1e-7):
        beta = abs(end - step)
        found, _ = fused(case, Distillation(divergence="jsd", beta=beta))
        assert error(found, wanted) < 20 * step + 1e-5
    assert error(fused(case, Distillation(divergence="jsd", beta=end))[0], wanted) == 0


def test_jsd_at_one_half_is_four_times_the_textbooks() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).double(), torch.tensor([[0.1, 0.3, 0.6]]).double()
    m = (p + q) / 2
    textbook = 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum()
    found = jsd(make_events(p.log(), q.log(), torch.ones_like(p).bool()), Parameters(beta=0.5))
    assert float(found) == pytest.approx(4 * float(textbook), rel=1e-12)


def draw_entries(log_p: Tensor, draws: int) -> TeacherTopK:
    """Draws from a proposal that is flatter than the teacher, with importance weights p / (draws · proposal)."""
    proposal = (0.7 * log_p).log_softmax(dim=1)
    ids = torch.multinomial(proposal.exp(), draws, replacement=True)
    weights = (log_p - proposal).gather(1, ids) - math.log(draws)
    return TeacherTopK(ids, weights, torch.full((len(log_p),), -torch.inf, dtype=torch.float64))


def test_sampled_entries_give_the_full_gradient_on_average() -> None:
    """4000 draws of 12 entries with repeats: the mean gradient within 4.5 standard errors of the exact one, in each
    of 24 numbers (a true gradient fails with p < 2e-4). A bias of a tenth of the gradient's size would be seen:
    it is over 10 standard errors, which is asserted too.
    """
    torch.manual_seed(2)
    case = replace(plain(n=4, v=10, k=1, d=6), mask=torch.ones(4).bool())
    log_p = (1.5 * torch.randn(4, 10, dtype=torch.float64)).log_softmax(dim=1)
    full = TeacherTopK(torch.arange(10).expand(4, 10), log_p, torch.full((4,), -torch.inf, dtype=torch.float64))
    exact, _ = fused(replace(case, teacher=full), Distillation(divergence="cross_entropy", tail="unnormalized"))
    repeats = 4000
    copies = rows(replace(case, teacher=full), [*range(4)] * repeats)  # type: ignore[arg-type]
    drawn = draw_entries(log_p.repeat(repeats, 1), 12)
    assert (drawn.ids.sort(dim=1).values.diff(dim=1) == 0).any()
    for divergence in ("forward_kl", "cross_entropy"):
        term = Distillation(divergence=divergence, tail="sampled")
        found, _ = fused(replace(copies, teacher=drawn), term, chunk_tokens=4096)
        each = found["hidden"].view(repeats, 4, 6)
        standard_error = each.std(dim=0) / repeats**0.5
        assert (each.mean(dim=0) - exact["hidden"]).abs().div(standard_error).max() < 4.5
        assert 0.1 * exact["hidden"].abs().max() > 10 * standard_error.mean()
    # The cross-entropy's value is unbiased too (the last one computed): within a percent.
    assert float(found["loss"]) / repeats == pytest.approx(float(exact["loss"]), rel=0.01)


def test_repeated_ids_count_once_in_the_students_mass_and_gradient() -> None:
    torch.manual_seed(3)
    case = replace(plain(n=3, v=8, k=1), mask=torch.ones(3).bool())
    ids, counts = torch.tensor([[5, 5, 2, 5]] * 3), torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=torch.float64)
    tail = torch.full((3,), -torch.inf, dtype=torch.float64)
    repeated = TeacherTopK(ids, counts.log().expand(3, 4), tail)
    merged = TeacherTopK(
        torch.tensor([[5, 2]] * 3), torch.tensor([0.6, 0.4], dtype=torch.float64).log().expand(3, 2), tail
    )
    term = Distillation(divergence="cross_entropy", tail="sampled")
    found, sums = fused(replace(case, teacher=repeated), term)
    wanted, sums_wanted = fused(replace(case, teacher=merged), term)
    assert error(found, wanted) < 1e-12
    assert float(sums.sums["student_mass"]) == pytest.approx(float(sums_wanted.sums["student_mass"]))
