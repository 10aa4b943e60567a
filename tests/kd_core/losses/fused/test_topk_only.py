"""The pass over K rows of the head: which objectives take it, and that it is right wherever the other pass is.

`test_fused.py` holds it to the oracle too, for every divergence on `renormalized`.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd_core.losses.compatibility import ALLOWED_DIVERGENCES
from kd_core.losses.fused import cuda_backend, topk_only
from kd_core.losses.fused.cpu_backend import CpuBackend
from kd_core.losses.objective import CacheFacts, CrossEntropy, Distillation, Objective, Term
from kd_core.losses.sparse_view import SparseView
from kd_core.losses.token_selection import KeepUncertain
from kd_core.training.evaluation import metric_names
from kd_core.types import LmHeadForm, TeacherTopK
from tests.kd_core.losses.cases import CASES, Case, Result, error, fused, make, plain, reference

DIVERGENCES = ALLOWED_DIVERGENCES["renormalized"]


def over_vocabulary(case: Case, term: Term, head: LmHeadForm | None = None) -> Result:
    """The same loss through the other pass: a term that asks for the label is there, at no weight."""
    objective = Objective({"kd": term, "sft": CrossEntropy(weight=0.0)}, chunk_tokens=3)
    assert objective.needs_vocabulary
    return fused(case, objective, head=head)[0]


def test_an_objective_takes_it_if_no_term_asks_for_more() -> None:
    alone = Objective({"kd": Distillation(tail="renormalized"), "rkl": Distillation(0.5, "reverse_kl", "renormalized")})
    assert not alone.needs_vocabulary
    by_teacher = Distillation(tail="renormalized", keep=KeepUncertain(0.5, "teacher_entropy"))
    assert not Objective({"kd": by_teacher}).needs_vocabulary
    by_student = Distillation(tail="renormalized", keep=KeepUncertain(0.5, "student_entropy"))
    for term in (by_student, Distillation(), Distillation(tail="truncated"), CrossEntropy()):
        assert Objective({"kd": term}).needs_vocabulary
        assert replace(alone, terms={**alone.terms, "more": term}).needs_vocabulary
    assert replace(alone, observe=("student_entropy",)).needs_vocabulary


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at", [(1.0, 1.0), (2.0, 2.0), (1.5, 0.5)])
def test_equals_the_oracle_and_the_other_pass(name: str, at: tuple[float, float]) -> None:
    """At a temperature, the oracle gets hidden states and log-probabilities that were divided by it."""
    case = make(name).to(torch.float64)
    scale = at[0] * at[1]
    entries = case.teacher.log_probs / at[0]
    cooled = replace(case, hidden=case.hidden / at[1], teacher=case.teacher._replace(log_probs=entries))
    for divergence in DIVERGENCES:
        term = Distillation(divergence=divergence, tail="renormalized", temperature=at[0], student_temperature=at[1])
        found, _ = fused(case, term)
        wanted = reference(cooled, term)
        by_hidden = wanted["hidden"] * (scale / at[1])
        assert (
            error(found, Result(loss=wanted["loss"] * scale, hidden=by_hidden, weight=wanted["weight"] * scale)) < 1e-10
        )
        assert error(found, over_vocabulary(case, term)) < 1e-10


@pytest.mark.parametrize(
    "head",
    [
        LmHeadForm(scale=0.25),
        LmHeadForm(soft_cap=2.0),
        LmHeadForm(vocab_size=11),
        LmHeadForm(bias=torch.randn(13, dtype=torch.float64), vocab_size=11, scale=0.5, soft_cap=5.0),
    ],
    ids=["scale", "soft cap", "padded vocabulary", "all"],
)
def test_heads_with_scale_bias_cap_and_padding(head: LmHeadForm) -> None:
    torch.manual_seed(0)
    case, term = plain(), Distillation(tail="renormalized", divergence="jsd", temperature=2.0)
    case = replace(case, teacher=case.teacher._replace(ids=case.teacher.ids % 11), labels=case.labels % 11)
    results = []
    for run in (lambda each: fused(case, term, head=each)[0], lambda each: over_vocabulary(case, term, each)):
        bias = None if head.bias is None else head.bias.clone().requires_grad_()
        found = run(replace(head, bias=bias))
        if bias is not None:
            assert bias.grad is not None
            found["bias"] = bias.grad
        results.append(found)
    assert error(results[0], results[1]) < 1e-12
    assert (results[0]["weight"][11:] == 0).all()


def test_a_device_may_take_the_vocabulary_instead_and_the_sums_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case, term = make("odd sizes").to(torch.float64), Distillation(tail="renormalized")
    wanted, wanted_sums = fused(case, term)
    monkeypatch.setattr(CpuBackend, "support_is_cheaper", lambda *_: False)
    monkeypatch.setattr(topk_only, "_view", None)  # not called
    found, sums = fused(case, term)
    assert error(found, wanted) < 1e-12
    assert list(sums.sums) == list(wanted_sums.sums)
    assert all(torch.allclose(sums.sums[name], value) for name, value in wanted_sums.sums.items())
    # A GPU takes the support for few entries of a large vocabulary.
    assert cuda_backend.support_is_cheaper(32, 151_936)
    assert not cuda_backend.support_is_cheaper(64, 49_152)


def test_chunks_and_repeated_ids_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that repeat in a row, in a chunk and over chunks; a chunk may hold a single position."""
    torch.manual_seed(1)
    case = plain(n=9, v=7, k=4)
    case = replace(case, teacher=case.teacher._replace(ids=torch.randint(7, (9, 4))))
    term = Distillation(tail="renormalized", divergence="reverse_kl")
    wanted = over_vocabulary(case, term)
    for rows in (1, 8, 1000):
        monkeypatch.setattr(CpuBackend, "gathered_rows", rows)
        assert error(fused(case, term, chunk_tokens=5)[0], wanted) < 1e-12
    distinct = topk_only._distinct(case.teacher.ids, case.teacher.log_probs > -torch.inf)
    for ids, marks in zip(case.teacher.ids, distinct, strict=True):
        assert sorted(ids[marks].tolist()) == sorted(set(ids.tolist()))


def test_unused_entries_are_not_in_the_support() -> None:
    ids, used = torch.tensor([[3, 0, 3, 5], [0, 0, 0, 0]]), torch.tensor([[True, False, True, False], [False] * 4])
    assert topk_only._distinct(ids, used).tolist() == [[True, False, False, False], [False] * 4]


def test_selection_by_the_teachers_entropy() -> None:
    torch.manual_seed(2)
    case, term = plain(n=17, v=21, k=5), Distillation(tail="renormalized", keep=KeepUncertain(0.3, "teacher_entropy"))
    assert error(fused(case, term)[0], over_vocabulary(case, term)) < 1e-12


def test_its_sums_are_those_of_the_teacher_and_evaluation_has_them_all() -> None:
    torch.manual_seed(3)
    case, term = plain(n=40, v=12, k=4, d=3), Distillation(tail="renormalized")
    objective = Objective({"kd": term}, chunk_tokens=7)
    _, found = fused(case, objective)
    assert set(found.sums) == set(objective.sum_names())
    assert set(found.sums) == {"loss", "kd_loss", "teacher_mass", "teacher_entropy", "label_in_support"}
    _, whole = fused(case, Objective({"kd": term, "sft": CrossEntropy(weight=0.0)}, chunk_tokens=7))
    for name, value in found.sums.items():
        assert float(value) == pytest.approx(float(whole.sums[name]), rel=1e-12), name
    known = metric_names(objective, CacheFacts(vocab_size=12, top_k=4))
    assert {"val/kl", "val/nll", "val/student_mass", "val/acceptance", "val/student_entropy"} <= known


@dataclass(frozen=True)
class Greedy(Term):
    """Claims to need the support alone, and reads the label."""

    @property
    def needs_vocabulary(self) -> bool:
        return False

    def values(self, view: SparseView) -> Tensor:
        return view.student_label + view.student_log_probs.sum(dim=1)


def test_a_term_that_asks_for_what_is_not_known_gets_nan_and_no_wrong_number() -> None:
    _, found = fused(plain(), Greedy())
    assert found.total.isnan()


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_lower_precisions_are_exact_on_their_rounded_inputs(how: str) -> None:
    """Products of rows are float32, so only inputs and results are rounded."""
    torch.manual_seed(4)
    case = plain(33, 257, 8, 64)
    case = replace(case, weight=case.weight / 4)
    case = case.to(torch.float32 if how == "autocast" else getattr(torch, how))
    term = Distillation(tail="renormalized", divergence="jsd")
    truth = reference(case, term)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found, _ = fused(case, term, chunk_tokens=16)
    rounding = {"autocast": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}[how]
    for name, value in truth.items():
        assert found[name].dtype == (torch.float32 if name == "loss" else case.hidden.dtype)
        assert float((found[name].double() - value).norm()) <= rounding * float(value.norm()), name


class Largest(TorchDispatchMode):
    """Remembers the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func: "object", types: "object", args: "object" = (), kwargs: "object" = None) -> Any:
        result = func(*args, **(kwargs or {}))  # type: ignore[operator,misc]
        for each in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, each.numel() if isinstance(each, Tensor) else 0)
        return result


def test_nothing_is_as_large_as_logits_of_the_vocabulary() -> None:
    torch.manual_seed(5)
    n, v, k = 64, 4096, 2
    teacher = TeacherTopK(torch.randint(v, (n, k)), torch.full((n, k), -1.0), torch.full((n,), -2.0))
    case = Case(torch.randn(n, 2), torch.randn(v, 2), teacher, torch.zeros(n).long(), torch.ones(n).bool())
    sizes = []
    for term in (Distillation(tail="renormalized"), Distillation(tail="truncated")):
        with Largest() as largest:
            fused(case, term, chunk_tokens=64)
        sizes.append(largest.numel)
    assert sizes == [v * 2, n * v]  # the weight's gradient, and a chunk's logits
