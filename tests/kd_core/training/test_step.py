"""The gradient of a step is that of the mean over its scored tokens, however the tokens are laid out."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from data.cache.manifest import read_manifest
from data.cache.record import Record
from data.stream.collate import Collate
from kd_core.errors import NonFiniteError
from kd_core.losses.objective import CacheFacts, CrossEntropy, Distillation, Objective
from kd_core.parallel.mesh import World
from kd_core.parallel.plan import Parallel
from kd_core.students.decoder import Decoder
from kd_core.students.starts import Pretrained, build
from kd_core.training.evaluation import Asked, evaluate
from kd_core.training.step import batch_loss, train_step
from kd_core.types import Batch
from tests.tiny import ROW_LENGTH, VOCAB, Tiny

OBJECTIVE = Objective({"kd": Distillation(weight=0.9), "sft": CrossEntropy(weight=0.1)}, chunk_tokens=13)
FLOAT32 = Parallel(precision="float32")
FACTS = CacheFacts(vocab_size=VOCAB, top_k=8)


def _model(tiny: Tiny) -> Decoder:
    return build(Pretrained(str(tiny.teacher), keep_layers=(0, 3)), torch.device("cpu"), seed=0)


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
    teacher = build(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    batch = Collate(ROW_LENGTH)([[record] for record in _records(tiny)])
    found = evaluate(teacher, [batch], FACTS, asked=Asked(OBJECTIVE), parallel=FLOAT32, world=World())
    assert found["val/kl"] < 2 * read_manifest(tiny.train).audit.kl_mean < 1e-3
    assert found["val/top1_agreement"] == 1
    assert found["val/nll"] == pytest.approx(found["val/teacher_nll"], rel=1e-3)
    assert found["val/student_mass"] == pytest.approx(found["val/teacher_mass"], rel=1e-3)


def test_evaluation_does_not_depend_on_batches(tiny: Tiny) -> None:
    model, records = _model(tiny), _records(tiny)
    collate = Collate(ROW_LENGTH)
    whole = evaluate(
        model, [collate([[r] for r in records])], FACTS, asked=Asked(OBJECTIVE), parallel=FLOAT32, world=World()
    )
    parts = evaluate(
        model, [collate([[r]]) for r in records], FACTS, asked=Asked(OBJECTIVE), parallel=FLOAT32, world=World()
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
