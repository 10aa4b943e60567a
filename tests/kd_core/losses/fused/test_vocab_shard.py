"""Ranks that share the vocabulary: the whole loss family against the oracle, and what they say to each other."""

import math
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist

from kd_core.losses.compatibility import ALLOWED_DIVERGENCES
from kd_core.losses.fused import lm_head
from kd_core.losses.fused.loss import fused_loss
from kd_core.losses.fused.vocab_shard import VocabShard
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.losses.token_selection import KeepUncertain
from kd_core.parallel.world import World
from kd_core.types import LmHeadForm, TeacherTopK
from tests.kd_core.losses.cases import CASES, Case, Result, error, fused, leaves, make, reference
from tests.ranks import run_ranks

CE = CrossEntropy(label_smoothing=0.1, z_loss=0.01)
# What the oracle does not know is compared with one process, which it holds to account elsewhere.
OBJECTIVES = {
    "cross-entropy": Objective({"sft": CE}, 3),
    "two temperatures": Objective({"kd": Distillation(temperature=1.0, student_temperature=2.0), "sft": CE}, 2),
    "selected by the student": Objective({"kd": Distillation(keep=KeepUncertain(0.5)), "sft": CE}, 3),
    "support alone": Objective({"kd": Distillation(tail="renormalized", temperature=2.0)}, 2),
    "observed": Objective({"kd": Distillation(), "sft": CE}, 3, observe=("student_entropy",)),
}
SOME_CASES = ("plain", "varying entries", "odd sizes", "sure outside")
HEADS = {
    "plain": LmHeadForm(),
    "padded": LmHeadForm(vocab_size=11),
    "scaled and capped": LmHeadForm(scale=0.5, soft_cap=3.0),
}


def parted(case: Case, objective: Objective, world: World, head: LmHeadForm) -> tuple[Result, dict[str, torch.Tensor]]:
    """As `fused`, with this rank's rows of the head; its gradients put together from those of all ranks."""
    hidden, weight = leaves(case)
    each = math.ceil(len(weight) / world.size)
    first = world.rank * each
    assert dist.group.WORLD is not None
    part = VocabShard(first, dist.group.WORLD)
    bias = None if head.bias is None else head.bias[first : first + each]
    form = LmHeadForm(bias, head.vocab_size or len(weight), head.scale, head.soft_cap)
    rows = weight[first : first + each]
    found = fused_loss(hidden, rows, case.teacher, case.labels, case.mask, objective, form=form, shard=part)
    found.total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    dist.all_reduce(hidden.grad)
    dist.all_reduce(weight.grad)
    return Result(loss=found.total.detach(), hidden=hidden.grad, weight=weight.grad), found.sums


def fits(case: Case, size: int) -> bool:
    """Whether every rank has a row."""
    rows = len(case.weight)
    return (size - 1) * math.ceil(rows / size) < rows


def all_cases(world: World) -> None:
    checked = 0
    for name in CASES:
        case = make(name).to(torch.float64)
        if not fits(case, world.size):
            continue
        for tail, divergences in ALLOWED_DIVERGENCES.items():
            for divergence in divergences:
                term = Distillation(divergence=divergence, tail=tail)
                found, sums = parted(case, Objective({"kd": term}, 3), world, LmHeadForm())
                alone, wanted_sums = fused(case, term)
                assert error(found, reference(case, term)) < 1e-10, (name, divergence, tail)
                assert error(found, alone) < 1e-10
                assert all(torch.allclose(sums[k], v.double()) for k, v in wanted_sums.sums.items()), (name, tail)
                checked += 1
    assert checked > 400


def other_objectives(world: World, names: tuple[str, ...] = SOME_CASES) -> None:
    for name in names:
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
            case = make(name).to(dtype)
            for objective in OBJECTIVES.values():
                for head in HEADS.values():
                    if not fits(case, world.size) or (head.vocab_size or 0) > len(case.weight):
                        continue
                    inside = (torch.where(case.mask[:, None], case.teacher.ids, 0) < (head.vocab_size or 99)).all()
                    if not inside or (torch.where(case.mask, case.labels, 0) >= (head.vocab_size or 99)).any():
                        continue
                    found, sums = parted(case, objective, world, head)
                    alone, wanted = fused(case, objective, head=head)
                    assert error(found, alone) < tolerance, (name, objective, head)
                    assert all(torch.allclose(sums[k], v.double(), rtol=1e-4) for k, v in wanted.sums.items())


def ranks_of_padding(world: World) -> None:
    """Padding rows that would take nearly all probability; the last ranks hold nothing else."""
    checked = 0
    for name in SOME_CASES:
        case = make(name).to(torch.float64)
        V = len(case.weight)
        filler = 100 * torch.randn(3 * V, case.weight.shape[1], generator=torch.Generator().manual_seed(0)).double()
        padded = replace(case, weight=torch.cat([case.weight, filler]))
        for tail, divergences in ALLOWED_DIVERGENCES.items():
            for divergence in divergences:
                term = Distillation(divergence=divergence, tail=tail)
                found, _ = parted(padded, Objective({"kd": term}, 3), world, LmHeadForm(vocab_size=V))
                assert not found["weight"][V:].any()
                found["weight"] = found["weight"][:V]
                assert error(found, reference(case, term)) < 1e-10, (name, divergence, tail)
                checked += 1
        for objective in OBJECTIVES.values():
            for head in (LmHeadForm(), LmHeadForm(scale=0.5, soft_cap=3.0)):
                found, sums = parted(padded, objective, world, replace(head, vocab_size=V))
                alone, wanted = fused(case, objective, head=head)
                assert not found["weight"][V:].any()
                found["weight"] = found["weight"][:V]
                assert error(found, alone) < 1e-10, (name, objective, head)
                assert all(torch.allclose(sums[k], v.double()) for k, v in wanted.sums.items())
    assert checked > 100


class Counted:
    """Elements that pass through all_reduce."""

    def __init__(self) -> None:
        self.elements: list[int] = []
        self.inner = dist.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: object, **settings: object) -> None:
        self.elements.append(tensor.numel())
        self.inner(tensor, *args, **settings)  # type: ignore[arg-type]


def says_little(world: World) -> None:
    """Two reductions a chunk, of O(n K) numbers, none in the backward pass."""
    N, K, V, D = 64, 8, 49_152, 4
    hidden = torch.randn(N, D, requires_grad=True)
    rows = torch.randn(V // world.size, D, requires_grad=True)
    log_probs = torch.randn(N, K).log_softmax(dim=1) - 0.1
    teacher = TeacherTopK(torch.randint(V, (N, K)), log_probs, torch.log1p(-log_probs.exp().sum(dim=1)))
    form, shard = LmHeadForm(vocab_size=V), VocabShard(world.rank * V // world.size, dist.group.WORLD)
    counted, mask = Counted(), torch.ones(N).bool()
    objective = Objective({"kd": Distillation(), "sft": CrossEntropy()}, chunk_tokens=32)
    with mock.patch.object(dist, "all_reduce", counted):
        total = fused_loss(hidden, rows, teacher, torch.randint(V, (N,)), mask, objective, 1.0, form, shard).total
        forward = list(counted.elements)
        total.backward()
    assert forward == [32, 32 * (2 * K + 4)] * 2
    assert counted.elements == forward
    assert sum(forward) * 100 < N * V


def uneven_shards_take_equal_chunks(world: World) -> None:
    """Where the objective sets no chunk: it depends on rows, of which ranks have unequal numbers."""
    case, terms = make("odd sizes").to(torch.float64), {"kd": Distillation(), "sft": CE}
    assert len(case.weight) % world.size
    with mock.patch.object(lm_head, "chunk_positions", lambda rows, _: 1 + rows % 3):
        found, _ = parted(case, Objective(terms), world, LmHeadForm())
    assert error(found, fused(case, Objective(terms))[0]) < 1e-10


def both(world: World) -> None:
    torch.manual_seed(world.rank)
    uneven_shards_take_equal_chunks(world)
    other_objectives(world)
    says_little(world)
    all_cases(world)


def test_two_ranks_have_the_loss_and_gradients_of_one() -> None:
    run_ranks(2, both)


def test_four_ranks_have_the_loss_and_gradients_of_one() -> None:
    run_ranks(4, other_objectives)


def test_ranks_that_hold_padding_alone_take_no_probability() -> None:
    run_ranks(4, ranks_of_padding)
