"""The gradient of a step is that of the mean over its scored tokens, however the tokens are laid out."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from data.cache.manifest import read_manifest
from data.cache.record import Record
from data.stream.collate import Collate
from kd_core.errors import NonFiniteError
from kd_core.losses.objective import CacheFacts, CrossEntropy, Distillation, Objective
from kd_core.losses.term_weights import WarmupStableDecay
from kd_core.losses.token_selection import KeepUncertain
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training.checkpoints.checkpoint_state import run_state
from kd_core.training.evaluation import EvaluationRequest, evaluate
from kd_core.training.optimizer import AdamW
from kd_core.training.step import StepSums, batch_loss, train_step
from kd_core.types import Batch
from tests.ranks import run_ranks
from tests.tiny import ROW_LENGTH, VOCAB, Tiny

OBJECTIVE = Objective({"kd": Distillation(weight=0.9), "sft": CrossEntropy(weight=0.1)}, chunk_tokens=13)
FLOAT32 = Parallel(precision="float32")
FACTS = CacheFacts(vocab_size=VOCAB, top_k=8)


def _model(tiny: Tiny) -> Decoder:
    return build_student(Pretrained(str(tiny.teacher), keep_layers=(0, 3)), torch.device("cpu"), seed=0)


def _records(tiny: Tiny) -> list[Record]:
    return tiny.records()[:8]


def _gradient(tiny: Tiny, batches: Sequence[Batch]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step, read off plain SGD with a rate of one."""
    model = _model(tiny)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = train_step(model, optimizer, batches, objective=OBJECTIVE, clip_norm=0.0, parallel=FLOAT32, world=World())
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return result.sums["loss"] / result.tokens, before - after


def _dense_float64(tiny: Tiny, records: Sequence[Record]) -> tuple[float, torch.Tensor]:
    """The same by full softmax in float64, one document at a time."""
    model = _model(tiny).double()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for record in records:
        tokens = torch.from_numpy(record.token_ids.astype("int64"))
        T = record.positions
        logits = model(tokens[None, :-1], torch.arange(T)[None], torch.zeros(1, T, dtype=torch.int64))[0]
        q = torch.log_softmax(logits, dim=-1)
        for t in range(T):
            if not record.loss_mask[t]:
                continue
            p = torch.from_numpy(record.topk_log_probs[t].astype("float64"))
            on = q[t, torch.from_numpy(record.topk_token_ids[t].astype("int64"))]
            rest = torch.tensor(float(record.tail_log_prob[t]), dtype=torch.float64)
            kl = (p.exp() * (p - on)).sum() + rest.exp() * (rest - torch.log1p(-on.exp().sum()))
            total = total + 0.9 * kl - 0.1 * q[t, tokens[t + 1]]
            count += 1
    (total / count).backward()
    return (total / count).item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_loss_and_gradient_equal_a_dense_float64_computation(tiny: Tiny) -> None:
    records = _records(tiny)
    half = replace(records[0], loss_mask=records[0].loss_mask * 0)
    records[0] = half
    loss, gradient = _gradient(tiny, [Collate(ROW_LENGTH)([[record] for record in records])])
    truth, wanted = _dense_float64(tiny, records)
    assert loss == pytest.approx(truth, rel=1e-5)
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_micro_batches_packing_and_padding_do_not_change_the_gradient(tiny: Tiny) -> None:
    records = _records(tiny)[:6]
    one_each = [[record] for record in records]
    packed = [[records[0], records[1]], [records[2]], [records[3], records[4], records[5]]]
    room = Collate(row_length=96)
    layouts = {
        "one batch": [room(one_each)],
        "a record a micro-batch": [room([row]) for row in one_each],
        "uneven micro-batches": [room(one_each[:1]), room(one_each[1:])],
        "packed": [room(packed)],
        "padded to the longest": [Collate(row_length=96, padding="longest")(packed)],
        "an empty micro-batch more": [
            room(one_each),
            room([[replace(records[0], loss_mask=records[0].loss_mask * 0)]]),
        ],
    }
    loss, gradient = _gradient(tiny, layouts.pop("one batch"))
    for name, batches in layouts.items():
        other_loss, other = _gradient(tiny, batches)
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        assert (other - gradient).norm() < 1e-5 * gradient.norm(), name


def test_rows_beyond_the_real_vocabulary_neither_count_nor_learn(tiny: Tiny) -> None:
    """A student whose head has rows that are no tokens has the loss and gradient of one without them."""
    batch = Collate(ROW_LENGTH)([[record] for record in _records(tiny)[:4]])
    small = _model(tiny)
    arch = replace(small.arch, padded_vocab_size=small.arch.vocab_size + 5)
    padded = Decoder(arch)
    state = small.state_dict()
    for name in ("embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, 5), value=9.0)
    padded.load_state_dict(state)
    found = []
    for model in (small, padded):
        loss = batch_loss(model, batch, OBJECTIVE, 1.0)
        loss.total.backward()
        found.append((float(loss.total.detach()), model.lm_head.weight.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[1][1], torch.nn.functional.pad(found[0][1], (0, 0, 0, 5)))


def test_a_non_finite_loss_moves_nothing(tiny: Tiny) -> None:
    model = _model(tiny)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    batch = Collate(ROW_LENGTH)([[record] for record in _records(tiny)[:2]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    with pytest.raises(NonFiniteError):
        train_step(model, optimizer, [batch], objective=OBJECTIVE, clip_norm=1.0, parallel=FLOAT32, world=World())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_the_teacher_against_its_own_cache_has_no_divergence(tiny: Tiny) -> None:
    teacher = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    batch = Collate(ROW_LENGTH)([[record] for record in _records(tiny)])
    found = evaluate(teacher, [batch], FACTS, asked=EvaluationRequest(OBJECTIVE), parallel=FLOAT32, world=World())
    assert found["val/kl"] < 2 * read_manifest(tiny.train).audit.kl_mean < 1e-3
    assert found["val/top1_agreement"] == 1
    assert found["val/nll"] == pytest.approx(found["val/teacher_nll"], rel=1e-3)
    assert found["val/student_mass"] == pytest.approx(found["val/teacher_mass"], rel=1e-3)


def test_evaluation_does_not_depend_on_batches(tiny: Tiny) -> None:
    model, records = _model(tiny), _records(tiny)
    collate = Collate(ROW_LENGTH)
    whole = evaluate(
        model,
        [collate([[r] for r in records])],
        FACTS,
        asked=EvaluationRequest(OBJECTIVE),
        parallel=FLOAT32,
        world=World(),
    )
    parts = evaluate(
        model,
        [collate([[r]]) for r in records],
        FACTS,
        asked=EvaluationRequest(OBJECTIVE),
        parallel=FLOAT32,
        world=World(),
    )
    assert whole == pytest.approx(parts, rel=1e-6)


def test_a_step_whose_records_are_all_damaged_moves_nothing_and_counts_them(tiny: Tiny) -> None:
    model = _model(tiny)
    before = [parameter.clone() for parameter in model.parameters()]
    batch = replace(Collate(ROW_LENGTH)([[], []]), damaged_blocks=3)
    assert not batch.loss_mask.any()
    found = train_step(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        [batch, batch],
        objective=OBJECTIVE,
        clip_norm=1.0,
        parallel=FLOAT32,
        world=World(),
    )
    assert (found.tokens, found.damaged_blocks) == (0, 6)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


KEEPS = Objective({"kd": Distillation(keep=KeepUncertain(share=0.5))}, chunk_tokens=13)
ENDS = Objective({"kd": Distillation(weight=WarmupStableDecay(1.0, decay_steps=1))}, chunk_tokens=13).at(5, 5)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _of_nothing(world: World, tiny: Tiny, parallel: Parallel, objective: Objective, scored: Sequence[bool]) -> None:
    """Gather momentum in one step, then take one in which data-parallel rank r has scored positions if `scored[r]`."""
    world = world.with_layout(parallel.layout(world.size))
    model = parallelize(Pretrained(str(tiny.teacher), keep_layers=(0, 3)).build_on_meta(), parallel, world)
    Pretrained(str(tiny.teacher), keep_layers=(0, 3)).fill(model, 0)
    optimizer = AdamW(lr=0.01, weight_decay=0.1).build(model)
    batch = Collate(ROW_LENGTH)([[record] for record in _records(tiny)[:2]])

    def step(batches: Sequence[Batch], objective: Objective) -> StepSums:
        return train_step(
            model, optimizer, batches, objective=objective, clip_norm=1.0, parallel=parallel, world=world
        )  # fmt: skip

    assert step([batch], OBJECTIVE).moved
    before = {name: _whole(tensor) for name, tensor in run_state(model, optimizer).items()}
    result = step([batch.unscored(), batch if scored[world.dp_rank] else batch.unscored()], objective)
    after = {name: _whole(tensor) for name, tensor in run_state(model, optimizer).items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items()) != result.moved
    assert result.moved == (any(scored) and objective is not ENDS)
    assert before["optimizer.norm.weight.exp_avg"].any(), "without momentum nothing would be shown"


@pytest.mark.parametrize("objective", [OBJECTIVE, KEEPS, ENDS], ids=["all", "a share of them", "of no weight"])
@pytest.mark.parametrize("scored", [True, False])
def test_a_step_of_nothing_has_no_decay_and_no_momentum(tiny: Tiny, objective: Objective, scored: bool) -> None:
    _of_nothing(World(), tiny, FLOAT32, objective, [scored])


def _of_nothing_on_two(world: World, tiny: Tiny) -> None:
    copies, shared, tensors = (Parallel("float32", **plan) for plan in ({"shard": "none"}, {}, {"tensor_parallel": 2}))
    for scored in ([True, False], [False, False]):
        _of_nothing(world, tiny, copies, OBJECTIVE, scored)
        _of_nothing(world, tiny, shared, OBJECTIVE, scored)
    _of_nothing(world, tiny, tensors, OBJECTIVE, [False])
    _of_nothing(world, tiny, tensors, KEEPS, [True])


def test_ranks_decide_together_whether_a_step_is_one(tiny: Tiny) -> None:
    run_ranks(2, _of_nothing_on_two, tiny)
