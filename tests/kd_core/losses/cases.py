"""Small hard inputs: each is one thing that went wrong somewhere. Masked positions always hold garbage."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd_core.losses.fused.loss import LossSums, fused_loss
from kd_core.losses.objective import Distillation, Objective, Term
from kd_core.types import LmHeadForm, TeacherTopK
from tests.reference import dense


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    teacher: TeacherTopK
    labels: Tensor
    mask: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        """Hidden states and weight in another dtype, the teacher in float32 as a cache stores it (or in float64)."""
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        ids, log_probs, tail, _ = self.teacher
        teacher = TeacherTopK(ids, log_probs.to(kept), tail.to(kept))
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), teacher=teacher)


def random_teacher(n: int, v: int, k: int, spread: float = 2.0) -> TeacherTopK:
    log_p = (spread * torch.randn(n, v, dtype=torch.float64)).log_softmax(dim=1)
    ranked, ids = log_p.sort(dim=1, descending=True)
    tail = ranked[:, k:].logsumexp(dim=1) if v > k else torch.full((n,), -torch.inf, dtype=torch.float64)
    return TeacherTopK(ids[:, :k], ranked[:, :k], tail)


def plain(n: int = 5, v: int = 13, k: int = 4, d: int = 6, spread: float = 2.0) -> Case:
    hidden, weight = torch.randn(n, d, dtype=torch.float64), torch.randn(v, d, dtype=torch.float64)
    mask = torch.arange(n) % 4 != 1
    return Case(hidden, weight, random_teacher(n, v, k, spread), torch.randint(v, (n,)), mask)


def with_garbage(case: Case) -> Case:
    """NaN, infinities and impossible ids at every position that is not scored."""
    off = ~case.mask
    hidden, labels = case.hidden.clone(), case.labels.clone()
    ids, log_probs, tail = (field.clone() for field in case.teacher[:3])
    hidden[off], labels[off], ids[off], log_probs[off], tail[off] = torch.nan, -100, 10**6, torch.inf, torch.nan
    return replace(case, hidden=hidden, labels=labels, teacher=TeacherTopK(ids, log_probs, tail))


def with_entries(case: Case, log_probs: Tensor | None = None, tail: Tensor | float | None = None) -> Case:
    old = case.teacher
    new_tail = old.tail_log_prob if tail is None else torch.zeros_like(old.tail_log_prob) + tail
    return replace(case, teacher=TeacherTopK(old.ids, old.log_probs if log_probs is None else log_probs, new_tail))


def unsorted() -> Case:
    case = plain(n=6, k=5)
    order = torch.randperm(5)
    return replace(
        case, teacher=TeacherTopK(case.teacher.ids[:, order], case.teacher.log_probs[:, order], case.teacher[2])
    )


def varying() -> Case:
    """0 to K entries a position, the unused ones anywhere; they hold the id of a used one, or any id."""
    case = plain(n=8, v=17, k=4)
    used = torch.arange(4) < torch.tensor([4, 3, 2, 1, 0, 3, 2, 1])[:, None]
    ids = torch.where(used, case.teacher.ids, case.teacher.ids[:, :1])
    log_probs = torch.where(used, case.teacher.log_probs, -torch.inf)
    ids[5:], log_probs[5:] = ids[5:].flip(1), log_probs[5:].flip(1)
    ids[7, 0] = case.teacher.ids[7, 3]
    tail = torch.log1p(-log_probs.exp().sum(dim=1))
    return replace(case, teacher=TeacherTopK(ids, log_probs, tail), mask=torch.arange(8) != 1)


def borders() -> Case:
    case = plain(n=4, v=9, k=2)
    ids = torch.tensor([[0, 8], [8, 0], [8, 7], [0, 1]])
    return replace(case, teacher=case.teacher._replace(ids=ids), labels=torch.tensor([0, 8, 8, 0]))


def saturated(*, on_support: bool) -> Case:
    """Logits of ±1e4: the student is sure, of a token inside or outside the teacher's entries."""
    case = plain(n=5, v=11, k=3, d=11)
    token = case.teacher.ids[:, 1] if on_support else random_outside(case)
    hidden = torch.where(torch.nn.functional.one_hot(token, 11).bool(), 1e4, torch.randn(5, 11, dtype=torch.float64))
    hidden[2] = -hidden[2]
    return replace(case, hidden=hidden, weight=torch.eye(11, dtype=torch.float64))


def random_outside(case: Case) -> Tensor:
    inside = torch.zeros(len(case.hidden), len(case.weight)).scatter_(1, case.teacher.ids, 1.0)
    return inside.argmin(dim=1)


def one_hot() -> Case:
    case = plain()
    log_probs = torch.full_like(case.teacher.log_probs, -1e4)
    log_probs[:, 0] = 0.0
    return with_entries(case, log_probs, -1e4)


CASES = {
    "plain": plain,
    "one position": lambda: replace(plain(n=1), mask=torch.tensor([True])),
    "odd sizes": lambda: plain(n=7, v=31, k=5, d=3),
    "D = 1": lambda: plain(d=1),
    "K = 1": lambda: plain(k=1),
    "K = V - 1": lambda: plain(k=12),
    "K = V": lambda: plain(k=13),
    "V = 1": lambda: plain(v=1, k=1),
    "unsorted": unsorted,
    "varying entries": varying,
    "all padding": lambda: replace(plain(), mask=torch.zeros(5, dtype=torch.bool)),
    "borders of the vocabulary": borders,
    "sure inside": lambda: saturated(on_support=True),
    "sure outside": lambda: saturated(on_support=False),
    "one-hot teacher": one_hot,
    "flat teacher": lambda: plain(spread=0.0),
    "no tail recorded": lambda: with_entries(plain(), tail=-torch.inf),
    "tiny tail": lambda: with_entries(plain(), tail=-40.0),
    "mass above 1": lambda: with_entries(plain(k=12, spread=4.0), plain(k=12, spread=0.1).teacher.log_probs + 0.09),
    "log-probs of -1e4": lambda: with_entries(plain(), torch.tensor([-0.1, -1e4, -1e4, -2.4]).double().expand(5, 4)),
}


def make(name: str) -> Case:
    torch.manual_seed(list(CASES).index(name))
    return with_garbage(CASES[name]())


class Result(dict[str, Tensor]):
    """`loss`, and its gradient by hidden states and weight."""


def leaves(case: Case) -> tuple[Tensor, Tensor]:
    return case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()


def fused(
    case: Case, term: Term | Objective, chunk_tokens: int = 3, head: LmHeadForm | None = None, factor: float = 1.0
) -> tuple[Result, LossSums]:
    """Through the library, with an odd chunk. The gradients are those of factor · loss."""
    objective = Objective({"kd": term}, chunk_tokens) if isinstance(term, Term) else term
    hidden, weight = leaves(case)
    found = fused_loss(hidden, weight, case.teacher, case.labels, case.mask, objective, form=head)
    (factor * found.total).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(loss=found.total.detach(), hidden=hidden.grad, weight=weight.grad), found


def reference(case: Case, term: Distillation, **numbers: float) -> Result:
    """Through the oracle, in float64 from the same (already rounded) inputs."""
    hidden, weight = leaves(case.to(torch.float64))
    scored = torch.where(case.mask[:, None], hidden, 0.0)
    log_q = (scored @ weight.T).log_softmax(dim=1)
    found = dense.positions(log_q, case.teacher[:3], case.labels, case.mask)
    total = sum((dense.position_loss(each, term.divergence, term.tail, **numbers) for each in found), log_q.sum() * 0)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(loss=total.detach(), hidden=hidden.grad, weight=weight.grad)


def error(found: Result, wanted: Result) -> float:
    """The largest error of loss and gradients, relative to the largest number of each (or to 1)."""
    worst = 0.0
    for name, value in wanted.items():
        size = max(1.0, float(value.abs().max()))
        worst = max(worst, float((found[name].double() - value).abs().max()) / size)
    return worst
