"""One test for each mistake about losses in the table "Mistakes of peers in our own subject": it is named first.

Not here: those of tensor and data parallelism, which the losses do not know.
"""

import gc
import math
from dataclasses import replace

import pytest
import torch

from kd_core.errors import UsageError
from kd_core.losses.fused.loss import fused_loss
from kd_core.losses.objective import CacheFacts, CrossEntropy, Distillation, Objective
from kd_core.types import LmHeadForm, TeacherTopK
from tests.kd_core.losses.cases import Case, Result, error, fused, leaves, plain, reference

TERMS = [Distillation(), Distillation(divergence="reverse_kl"), Distillation(divergence="jsd"), CrossEntropy()]


def of_logits(logits: list[float], p: list[float], tail: float, label: int = 0) -> Case:
    """One position, float32; the weight is the identity, so that hidden states are logits."""
    teacher = TeacherTopK(torch.arange(len(p))[None], torch.tensor([p]).log(), torch.tensor([tail]).log())
    return Case(torch.tensor([logits]), torch.eye(len(logits)), teacher, torch.tensor([label]), torch.tensor([True]))


@pytest.mark.parametrize("term", TERMS)
def test_clamp_that_is_a_no_op_in_float32(term: Distillation) -> None:
    """The top-k holds all mass of teacher and student: 1 − Σ is 0, and log(clamp(0 or 1)) is no help."""
    found, _ = fused(of_logits([60.0, 59.0, -60.0, -70.0], [0.75, 0.25], 0.0), term)
    assert all(value.isfinite().all() for value in found.values())


def test_tau_squared_on_the_value_but_not_on_the_gradient() -> None:
    torch.manual_seed(0)
    case = plain()
    scaled, _ = fused(case, Distillation(tail="renormalized", temperature=2.0))
    plainly, _ = fused(case, Distillation(tail="renormalized", temperature=2.0, temperature_scaling="none"))
    assert error(scaled, Result({name: 4 * value for name, value in plainly.items()})) < 1e-12


def test_mean_per_micro_batch_then_over_micro_batches() -> None:
    torch.manual_seed(1)
    case, objective = plain(n=9), Objective({"kd": Distillation()})
    whole, _ = fused(case, objective)
    parts = []
    for pick in (slice(0, 2), slice(2, 9)):
        teacher = TeacherTopK(*(field[pick] for field in case.teacher[:3]))
        parts.append(
            fused(Case(case.hidden[pick], case.weight, teacher, case.labels[pick], case.mask[pick]), objective)
        )
    added = sum(found["weight"] for found, _ in parts)
    assert isinstance(added, torch.Tensor)
    assert error(Result(weight=added), Result(weight=whole["weight"])) < 1e-12


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_labels_not_shifted_or_shifted_twice(shift: int) -> None:
    """The student is sure of each position's own label: only unshifted is that free."""
    labels = torch.tensor([0, 1, 2, 3, 4])
    case = replace(plain(n=5, v=5, k=2, d=5), hidden=50 * torch.eye(5).double(), weight=torch.eye(5).double())
    found, _ = fused(replace(case, labels=labels.roll(shift), mask=torch.ones(5).bool()), CrossEntropy())
    assert float(found["loss"]) == pytest.approx(0.0 if shift == 0 else 250.0, abs=1e-6)


def test_teacher_renormalised_and_student_not() -> None:
    """At q = p the default stays; `truncated`, which does that on request, does not."""
    logits = [1.0, 0.5, 0.0, -1.0]
    q = torch.tensor(logits).softmax(dim=0).tolist()
    case = of_logits(logits, q[:2], q[2] + q[3])
    assert float(fused(case, Distillation())[0]["hidden"].abs().max()) < 1e-6
    assert float(fused(case, Distillation(tail="truncated"))[0]["hidden"].abs().max()) > 0.1


def test_both_renormalised_is_blind_to_everything_outside() -> None:
    """40% of the student's mass outside costs the default something."""
    near, far = (
        of_logits([math.log(x) for x in q], [0.7, 0.25], 0.05) for q in ([0.7, 0.25, 0.05], [0.42, 0.15, 0.43])
    )
    assert float(fused(far, Distillation(tail="renormalized"))[0]["loss"]) == pytest.approx(0, abs=1e-6)
    assert float(fused(near, Distillation())[0]["loss"]) == pytest.approx(0, abs=1e-6)
    assert float(fused(far, Distillation())[0]["loss"]) > 0.3


def test_tail_from_rounded_log_probs() -> None:
    """The recorded tail counts, whatever the rounded entries add up to."""
    p = [0.9, 0.0996]
    case = of_logits([2.0, 1.0, 0.0, -1.0], p, 4e-4)
    rounded = replace(case, teacher=case.teacher._replace(log_probs=case.teacher.log_probs.bfloat16().float()))
    assert abs(1 - float(rounded.teacher.log_probs.exp().sum()) - 4e-4) > 2e-4
    for divergence in ("forward_kl", "reverse_kl"):
        found, _ = fused(rounded, Distillation(divergence=divergence))
        assert error(found, reference(rounded, Distillation(divergence=divergence))) < 1e-5


def test_tail_at_another_temperature_derived_from_the_tail_at_1() -> None:
    objective = Objective({"kd": Distillation(temperature=2.0)})
    with pytest.raises(UsageError, match="cannot be computed from the entries"):
        objective.check_cache(CacheFacts(vocab_size=50, top_k=8))


@pytest.mark.parametrize("term", TERMS)
def test_minus_infinity_in_padded_slots(term: Distillation) -> None:
    torch.manual_seed(2)
    case = plain()
    log_probs = case.teacher.log_probs.clone()
    log_probs[1], log_probs[0, 2:] = -torch.inf, -torch.inf
    assert not case.mask[1]
    found, _ = fused(replace(case, teacher=case.teacher._replace(log_probs=log_probs)), term)
    assert all(value.isfinite().all() for value in found.values())
    assert (found["hidden"][1] == 0).all()


def test_padded_vocabulary_takes_probability() -> None:
    torch.manual_seed(3)
    case = plain(v=9)
    padded = replace(case, weight=torch.cat([case.weight, torch.zeros(7, 6).double()]))
    for term in TERMS:
        found, _ = fused(padded, term, head=LmHeadForm(vocab_size=9))
        wanted, _ = fused(case, term)
        assert float(found["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-12)
        assert (found["weight"][9:] == 0).all()


@pytest.mark.parametrize("sizes", [(1, 7, 3, 2), (3, 7, 1, 2), (3, 7, 3, 1), (1, 2, 1, 1), (1, 1, 1, 1)])
def test_squeeze_without_an_axis(sizes: tuple[int, int, int, int]) -> None:
    torch.manual_seed(4)
    case = plain(*sizes)
    for term in (Distillation(), Distillation(divergence="reverse_kl"), Distillation(divergence="jsd")):
        assert error(fused(case, term)[0], reference(case, term)) < 1e-12


def test_swapped_arguments_and_cross_entropy_under_the_name_of_kl() -> None:
    """(0.7, 0.2, 0.1) against (0.1, 0.3, 0.6), from a pocket calculator; no two of them are alike."""
    case = of_logits([math.log(x) for x in (0.1, 0.3, 0.6)], [0.7, 0.2], 0.1)
    for divergence, wanted in {"forward_kl": 1.1019, "reverse_kl": 1.0021, "cross_entropy": 1.9037}.items():
        found, _ = fused(case, Distillation(divergence=divergence))
        assert float(found["loss"]) == pytest.approx(wanted, abs=1e-4)


def test_chunks_that_autograd_keeps_all() -> None:
    """Between forward and backward nothing of the size of a chunk's logits is alive."""
    torch.manual_seed(5)
    case, objective = plain(n=64, v=512, d=2), Objective({"kd": Distillation(), "sft": CrossEntropy()}, chunk_tokens=8)
    hidden, weight = leaves(case)

    def large(each: object) -> bool:
        return issubclass(type(each), torch.Tensor) and each.numel() >= 8 * 512  # type: ignore[attr-defined]

    before = sum(large(each) for each in gc.get_objects())
    total = fused_loss(hidden, weight, case.teacher, case.labels, case.mask, objective).total
    assert sum(large(each) for each in gc.get_objects()) == before
    total.backward()


def test_jsd_that_jumps_at_its_ends() -> None:
    case = of_logits([math.log(x) for x in (0.1, 0.3, 0.6)], [0.7, 0.2], 0.1)
    at_end, near = (float(fused(case, Distillation(divergence="jsd", beta=beta))[0]["loss"]) for beta in (0.0, 0.001))
    assert near == pytest.approx(at_end, rel=0.01)
