"""Temperature, smoothing, schedules, selection, heads and metrics, and the combinations that are refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.losses.objective import CacheFacts, CrossEntropy, Distillation, Objective
from kd_core.losses.term_weights import Constant, Cosine, Linear, WarmupStableDecay
from kd_core.losses.token_selection import KeepUncertain
from kd_core.types import LmHeadForm, TeacherTopK
from tests.kd_core.losses.cases import Case, Result, error, fused, leaves, make, plain

CACHE = CacheFacts(vocab_size=100, top_k=8)


def by_autograd(case: Case, loss_of: "object", head: LmHeadForm | None = None) -> Result:
    """A dense loss of the logits [n, V] of scored positions, differentiated."""
    hidden, weight = leaves(case)
    head = head or LmHeadForm()
    logits = head.scale * (hidden[case.mask] @ weight[: head.vocab_size].T)
    if head.bias is not None:
        logits = logits + head.bias[: head.vocab_size]
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    loss = loss_of(logits)  # type: ignore[operator]
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(loss=loss.detach(), hidden=hidden.grad, weight=weight.grad)


def full_kl(log_p: Tensor, logits: Tensor, at: float, scale: float) -> Tensor:
    """Scale · KL between softmaxes at one temperature over all V."""
    log_q = (logits / at).log_softmax(dim=1)
    log_p = (log_p / at).log_softmax(dim=1)
    return scale * (log_p.exp() * (log_p - log_q)).sum()


def whole_vocabulary(case: Case) -> tuple[Case, Tensor]:
    """The case with K = V, and the teacher's log-probabilities of scored positions in order of id."""
    n, v = len(case.hidden), len(case.weight)
    log_p = (2 * torch.randn(n, v, dtype=torch.float64)).log_softmax(dim=1)
    teacher = TeacherTopK(torch.arange(v).expand(n, v), log_p, torch.full((n,), -torch.inf, dtype=torch.float64))
    return replace(case, teacher=teacher), log_p[case.mask]


@pytest.mark.parametrize("tail", ["renormalized", "truncated"])
@pytest.mark.parametrize(("scaling", "factor"), [("squared", 4.0), ("none", 1.0)])
def test_temperature_is_that_of_both_softmaxes_and_squared_on_value_and_gradient(
    tail: str, scaling: str, factor: float
) -> None:
    torch.manual_seed(0)
    case, log_p = whole_vocabulary(plain())
    term = Distillation(tail=tail, temperature=2.0, temperature_scaling=scaling)
    found, _ = fused(case, term)
    assert error(found, by_autograd(case, lambda logits: full_kl(log_p, logits, 2.0, factor))) < 1e-10


def test_a_captured_tail_gives_the_tail_bucket_at_its_temperature() -> None:
    torch.manual_seed(1)
    case, at = plain(n=6, v=15, k=4), 2.5
    log_p = (2 * torch.randn(6, 15, dtype=torch.float64)).log_softmax(dim=1)
    ranked, order = log_p.sort(dim=1, descending=True)
    captured = (ranked[:, 4:] / at).logsumexp(dim=1)
    teacher = TeacherTopK(order[:, :4], ranked[:, :4], ranked[:, 4:].logsumexp(dim=1), ((at, captured),))
    found, _ = fused(replace(case, teacher=teacher), Distillation(temperature=at))

    def wanted(logits: Tensor) -> Tensor:
        p, q = (log_p[case.mask] / at).softmax(dim=1), (logits / at).softmax(dim=1)
        ids, loss = order[case.mask], torch.zeros((), dtype=torch.float64)
        for row in range(len(p)):
            head, rest = ids[row, :4], ids[row, 4:]
            for a, b in [(p[row, j], q[row, j]) for j in head] + [(p[row, rest].sum(), q[row, rest].sum())]:
                loss = loss + at**2 * a * (a / b).log()
        return loss

    assert error(found, by_autograd(case, wanted)) < 1e-10


def test_temperatures_apart_multiply_and_other_terms_keep_their_own() -> None:
    torch.manual_seed(2)
    case = plain(n=6, v=15, k=14)
    objective = Objective({"kd": Distillation(student_temperature=3.0), "sft": CrossEntropy()}, chunk_tokens=4)
    found, _ = fused(case, objective)
    ids = case.teacher.ids[case.mask]
    last = torch.tensor([[j for j in range(15) if j not in row] for row in ids.tolist()])
    order, p = torch.cat([ids, last], dim=1), torch.cat([case.teacher[1], case.teacher[2][:, None]], dim=1)[case.mask]

    def wanted(logits: Tensor) -> Tensor:
        q = (logits / 3).log_softmax(dim=1).gather(1, order)
        kd = 3 * (p.exp() * (p - q)).sum()
        return kd + torch.nn.functional.cross_entropy(logits, case.labels[case.mask], reduction="sum")

    assert error(found, by_autograd(case, wanted)) < 1e-10


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
@pytest.mark.parametrize("at", [1.0, 2.0])
def test_heads_with_scale_bias_cap_and_padding(head: LmHeadForm, at: float) -> None:
    torch.manual_seed(3)
    bias = None if head.bias is None else head.bias.clone().requires_grad_()
    head = replace(head, bias=bias)
    real = head.vocab_size or 13
    case, log_p = whole_vocabulary(plain())
    log_p = log_p[:, :real].log_softmax(dim=1)
    entries = case.teacher.log_probs[:, :real].log_softmax(dim=1)
    case = replace(
        case, teacher=TeacherTopK(case.teacher.ids[:, :real], entries, case.teacher[2]), labels=case.labels % real
    )
    found, _ = fused(case, Distillation(tail="truncated", temperature=at), head=head)
    of_bias = None if bias is None else bias.grad
    if bias is not None:
        bias.grad = None
    wanted = by_autograd(case, lambda logits: full_kl(log_p, logits, at, at**2), head)
    assert error(found, wanted) < 1e-10
    assert (found["weight"][real:] == 0).all()
    if bias is not None:
        assert error(Result(bias=of_bias), Result(bias=bias.grad)) < 1e-10


def test_schedules_start_and_end_where_they_say() -> None:
    steps = 11
    assert [Constant(0.3).at(step, steps) for step in (0, 1, 11)] == [0.3] * 3
    assert [Linear(1.0, 0.0).at(step, steps) for step in (0, 1, 6, 11)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert [Cosine(1.0, 0.2).at(step, steps) for step in (1, 6, 11)] == pytest.approx([1.0, 0.6, 0.2])
    assert Cosine(1.0, 0.0).at(2, steps) > Linear(1.0, 0.0).at(2, steps)
    wsd = WarmupStableDecay(peak=2.0, warmup_steps=4, decay_steps=2, floor=0.5)
    assert [wsd.at(step, steps) for step in (1, 4, 9, 10, 11)] == pytest.approx([0.5, 2.0, 2.0, 1.25, 0.5])


def test_a_scheduled_weight_counts_at_its_step_and_not_before_it_is_resolved() -> None:
    case = make("plain").to(torch.float64)
    objective = Objective({"kd": Distillation(weight=Linear(0.0, 1.0))})
    with pytest.raises(UsageError, match=r"objective\.at"):
        fused(case, objective)
    half, _ = fused(case, objective.at(6, 11))
    none, sums = fused(case, objective.at(1, 11))
    whole, _ = fused(case, Distillation())
    assert error(half, Result({name: value / 2 for name, value in whole.items()})) < 1e-12
    assert (none["weight"] == 0).all()
    assert float(sums.sums["kd_loss"]) == pytest.approx(float(whole["loss"]))


@pytest.mark.parametrize("signal", ["student_entropy", "teacher_entropy"])
def test_selection_keeps_the_most_uncertain_share_of_scored_positions(signal: str) -> None:
    torch.manual_seed(4)
    case = plain(n=17, v=21, k=5)
    term = Distillation(keep=KeepUncertain(0.3, signal))
    found, _ = fused(case, term, chunk_tokens=4)
    if signal == "student_entropy":
        q = (case.hidden @ case.weight.T).softmax(dim=1)
    else:
        q = torch.cat([case.teacher[1], case.teacher[2][:, None]], dim=1).exp()
    entropy = torch.where(case.mask, -(q * q.log()).sum(dim=1), -1.0)
    scored = int(case.mask.sum())
    kept = entropy.topk(math.ceil(0.3 * scored)).indices
    factor = scored / len(kept)
    wanted, _ = fused(replace(case, mask=torch.zeros(17).bool().index_fill(0, kept, True)), Distillation())
    assert error(found, Result({name: factor * value for name, value in wanted.items()})) < 1e-12


def test_metrics_are_what_the_dense_distributions_say() -> None:
    torch.manual_seed(5)
    case = plain(n=40, v=12, k=4, d=3)
    objective = Objective({"kd": Distillation(), "sft": CrossEntropy()}, chunk_tokens=7, observe=("student_entropy",))
    _, found = fused(case, objective)
    q = (case.hidden @ case.weight.T).softmax(dim=1)[case.mask]
    ids, p = case.teacher.ids[case.mask], case.teacher.log_probs.exp()[case.mask]
    labels, tail = case.labels[case.mask], case.teacher.tail_log_prob.exp()[case.mask]
    wanted = {
        "teacher_mass": p.sum(),
        "student_mass": q.gather(1, ids).sum(),
        "top1_agreement": (q.argmax(dim=1) == ids[:, 0]).sum(),
        "topk_agreement": (q.argmax(dim=1)[:, None] == ids).any(dim=1).sum(),
        "teacher_entropy": -(p * p.log()).sum() - (tail * tail.log()).sum(),
        "student_entropy": -(q * q.log()).sum(),
        "label_in_support": (labels[:, None] == ids).any(dim=1).sum(),
        "acceptance": torch.minimum(p, q.gather(1, ids)).sum(),
        "sft_loss": -q.gather(1, labels[:, None]).log().sum(),
    }
    assert set(found.sums) == set(objective.sum_names())
    for name, value in wanted.items():
        assert float(found.sums[name]) == pytest.approx(float(value), rel=1e-10), name
    assert 0 < float(wanted["top1_agreement"]) < float(wanted["topk_agreement"]) < len(p)


def test_all_entries_as_likely_as_the_fifth_are_among_the_likeliest_five() -> None:
    """A cache keeps no order of entries that it rounds to one value."""
    torch.manual_seed(5)
    case = plain(n=200, v=9, k=8, d=3)
    log_probs = case.teacher.log_probs.clone()
    log_probs[:, 5:7] = log_probs[:, 4:5]
    case = replace(case, teacher=case.teacher._replace(log_probs=log_probs))
    objective = Objective({"kd": Distillation()}, observe=("top5_agreement",))
    best = (case.hidden @ case.weight.T).argmax(dim=1)[case.mask]
    wanted = (best[:, None] == case.teacher.ids[case.mask][:, :7]).any(dim=1).sum()
    assert wanted < len(best)
    assert float(fused(case, objective)[1].sums["top5_agreement"]) == float(wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "reverse_kl", "tail": "truncated"}, "Use tail 'tail_bucket' or 'renormalized'"),
        ({"divergence": "jsd", "tail": "sampled"}, "forward_kl, cross_entropy"),
        ({"divergence": "decoupled_kl", "tail": "renormalized"}, "Use tail 'tail_bucket'"),
        ({"divergence": "kl"}, "wanted one of adaptive_kl"),
        ({"tail": "ghost"}, "wanted one of"),
        ({"tail": "unnormalized", "temperature": 2.0}, "student_temperature"),
        ({"temperature": 0.0}, "wanted 0.01 to 100"),
        ({"beta": 0.1}, "jsd does"),
        ({"divergence": "jsd", "beta": 1.5}, "0 to 1"),
        ({"divergence": "skew_kl", "skew": 1.0}, "with itself"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_use(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Distillation(**settings)  # type: ignore[arg-type]


def test_what_only_the_cache_can_tell_is_refused_there() -> None:
    def check(cache: CacheFacts, **settings: object) -> None:
        Objective({"kd": Distillation(**settings)}).check_cache(cache)  # type: ignore[arg-type]

    check(CACHE)
    check(CACHE._replace(tail_temperatures=(1.0, 2.0)), temperature=2.0)
    check(CACHE._replace(top_k=100), tail="renormalized")
    check(CACHE, tail="renormalized", temperature=2.0)
    with pytest.raises(UsageError, match=r"loss\.terms\.kd\.temperature: got 2\.0"):
        check(CACHE, temperature=2.0)
    with pytest.raises(UsageError, match="no tail"):
        check(CACHE._replace(top_k=100))
    with pytest.raises(UsageError, match="cache of sampled entries"):
        check(CACHE._replace(sampled=True))
    with pytest.raises(UsageError, match="cache of the likeliest entries"):
        check(CACHE, tail="sampled")


def test_wrong_numbers_of_other_parts_are_refused() -> None:
    for make_it, message in (
        (lambda: CrossEntropy(label_smoothing=1.0), "label_smoothing"),
        (lambda: CrossEntropy(z_loss=-1.0), "z_loss"),
        (lambda: KeepUncertain(0.0), "share"),
        (lambda: LmHeadForm(soft_cap=0.0), "soft_cap"),
        (lambda: Linear(-1.0, 1.0), "Linear.start"),
        (lambda: Objective({"kd": Distillation(weight=0.0)}), "every weight is 0"),
        (lambda: Objective({"kd": Distillation()}, observe=("entropy",)), "student_entropy"),
        (lambda: fused(make("plain").to(torch.float64), Distillation(), head=LmHeadForm(vocab_size=99)), "at most"),
    ):
        with pytest.raises(UsageError, match=message):
            make_it()
