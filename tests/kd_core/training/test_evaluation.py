"""What an evaluation says, against an oracle in float64: of any batches, on any ranks, of several caches."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data.cache.record import Record
from data.stream.collate import Collate
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from kd_core.losses.objective import CacheFacts, CrossEntropy, Distillation, Objective
from kd_core.losses.sparse_view import SparseView
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training import evaluation
from kd_core.training.evaluation import EvaluationRequest, HeldOutCache, evaluate, evaluate_all, metric_names
from kd_core.types import Batch
from tests.ranks import run_ranks
from tests.reference import dense, measures
from tests.tiny import ROW_LENGTH, VOCAB, Tiny

OBJECTIVE = Objective({"kd": Distillation(weight=0.9), "sft": CrossEntropy(weight=0.1)}, chunk_tokens=7)
FLOAT32 = Parallel(precision="float32", micro_batch_rows=2)
HEAT = 0.3  # of the student's logits: it is too sure, so that there is something to mend


def surprise(view: SparseView) -> Tensor:
    """A user's metric."""
    return -view.student_label


def on_label(view: SparseView) -> Tensor:
    """Another, of truths."""
    return view.is_label.any(dim=1)


def start(folder: str) -> Pretrained:
    return Pretrained(folder, keep_layers=(0, 3))


def surer(model: Decoder) -> Decoder:
    """A student whose last norm makes larger logits."""
    with torch.no_grad():
        model.norm.weight.div_(HEAT)
    return model


def batches(records: Sequence[Record], rows: int) -> list[Batch]:
    collate = Collate(ROW_LENGTH)
    return [collate([[record] for record in records[at : at + rows]]) for at in range(0, len(records), rows)]


def positions_of(model: Decoder, found: Iterable[Batch]) -> list[dense.Position]:
    """By full softmax in float64."""
    model = model.double()
    positions: list[dense.Position] = []
    with torch.no_grad():
        for batch in found:
            logits = model(batch.tokens, batch.position_ids, batch.document_ids).flatten(0, 1)
            positions += dense.positions(
                logits.log_softmax(dim=1), batch.teacher()[:3], batch.labels.flatten(), batch.loss_mask.flatten()
            )
    model.float()
    return positions


def test_every_number_is_the_oracles(tiny: Tiny) -> None:
    model, found = (
        surer(build_student(start(str(tiny.teacher)), torch.device("cpu"), seed=0)),
        batches(tiny.records(), 4),
    )
    facts, table = CacheFacts(model.arch.vocab_size, 8), Tokenizer(tiny.teacher).byte_lengths()
    asked = EvaluationRequest(OBJECTIVE, (surprise, on_label), table)
    numbers = evaluate(model, found, facts, asked=asked, parallel=FLOAT32, world=World())
    assert set(numbers) == metric_names(OBJECTIVE, facts, asked.metrics)
    positions = positions_of(model, found)
    wanted = measures.all_measures(positions)
    mended = wanted.pop("temperature")
    assert 1.1 < mended < 3.9
    assert numbers["val/temperature"] == pytest.approx(mended, rel=0.003)
    assert {name: numbers[f"val/{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert numbers["val/surprise"] == numbers["val/nll"]
    assert numbers["val/on_label"] == numbers["val/label_in_support"]
    tokenizer = Tokenizer(tiny.teacher)
    size = sum(len(tokenizer.decode([each.label]).encode()) for each in positions)  # plain ASCII, no special token
    assert numbers["val/bits_per_byte"] == pytest.approx(wanted["nll"] * len(positions) / math.log(2) / size, rel=1e-5)


def test_terms_may_have_the_names_of_what_is_always_measured(tiny: Tiny) -> None:
    model, found = build_student(start(str(tiny.teacher)), torch.device("cpu"), seed=0), batches(tiny.records(), 4)
    terms = {"one": Distillation(weight=0.7, divergence="reverse_kl"), "two": CrossEntropy(weight=3.0)}
    same = Objective({"kl": terms["one"], "nll": terms["two"]}, chunk_tokens=7)
    facts = CacheFacts(model.arch.vocab_size, 8)
    asked = EvaluationRequest(same, (surprise,)), EvaluationRequest(Objective(terms, chunk_tokens=7))
    named, other = (evaluate(model, found, facts, asked=each, parallel=FLOAT32, world=World()) for each in asked)
    assert named["val/loss"] == pytest.approx(0.7 * other["val/reverse_kl"] + 3 * other["val/nll"], rel=1e-6)
    assert named["val/kl_loss"] == pytest.approx(other["val/reverse_kl"], rel=1e-6)
    assert {name: named[name] for name in ("val/kl", "val/nll")} == {
        name: other[name] for name in ("val/kl", "val/nll")
    }
    assert metric_names(same, facts) - metric_names(asked[1].objective, facts) == {"val/kl_loss", "val/nll_loss"}


def test_a_cache_of_few_entries_and_one_of_the_whole_vocabulary(tiny: Tiny) -> None:
    """`top_k` of 1 and of V: five likeliest of one; KLs without a tail."""
    model = build_student(start(str(tiny.teacher)), torch.device("cpu"), seed=0)
    one = batches([record.cut(top_k=1) for record in tiny.records()], 4)
    V = model.arch.vocab_size
    numbers = evaluate(
        model, one, CacheFacts(V, 1), asked=EvaluationRequest(OBJECTIVE), parallel=FLOAT32, world=World()
    )
    assert numbers["val/top5_agreement"] == numbers["val/top1_agreement"]
    whole = [_whole(batch, V) for batch in one]
    numbers = evaluate(
        model, whole, CacheFacts(V, V), asked=EvaluationRequest(OBJECTIVE), parallel=FLOAT32, world=World()
    )
    positions = positions_of(model, whole)
    for name in ("forward_kl", "reverse_kl"):
        exact = sum(float(dense.position_loss(each, name, "tail_bucket")) for each in positions) / len(positions)
        assert numbers[f"val/{name.removeprefix('forward_')}"] == pytest.approx(exact, rel=1e-4)


def _whole(batch: Batch, vocab: int) -> Batch:
    """With entries of all tokens, of some teacher."""
    torch.manual_seed(0)
    log_p = (2 * torch.randn(*batch.tokens.shape, vocab)).log_softmax(dim=-1)
    ids = torch.arange(vocab).expand_as(log_p)
    return replace(batch, topk_token_ids=ids, topk_log_probs=log_p, tail_log_prob=log_p[..., 0] * 0 - torch.inf)


def test_samples_have_no_likeliest_entries() -> None:
    facts = CacheFacts(VOCAB, 8, sampled=True)
    names = metric_names(OBJECTIVE, facts)
    assert {"val/teacher_cross_entropy", "val/ece", "val/temperature", "val/perplexity"} <= names
    assert not {"val/kl", "val/reverse_kl", "val/top5_agreement"} & names


def on_ranks(world: World, folder: str, records: list[Record], wanted: dict[str, float], table: Tensor) -> None:
    layouts = {
        "dp 2": FLOAT32,
        "tp 2": replace(FLOAT32, tensor_parallel=2),
        "tp 2, by position": replace(FLOAT32, tensor_parallel=2, sequence_parallel=True, shard="full"),
        "cp 2": replace(FLOAT32, context_parallel=2),
    }
    for name, parallel in layouts.items():
        laid_out = world.with_layout(parallel.layout(world.size))
        first = start(folder)
        model = parallelize(first.build_on_meta(), parallel, laid_out)
        first.fill(model, 0)
        own = records[laid_out.dp_rank :: laid_out.dp_size]
        found = evaluate(
            model,
            [batch.divided(laid_out.row_share) for batch in batches(own, 3)],
            CacheFacts(model.arch.vocab_size, 8),
            asked=EvaluationRequest(OBJECTIVE, (surprise, on_label), table),
            parallel=parallel,
            world=laid_out,
        )
        assert found == pytest.approx(wanted, rel=1e-4), name


def test_ranks_that_share_rows_or_the_vocabulary_say_the_same(tiny: Tiny) -> None:
    records, table = tiny.records()[:12], Tokenizer(tiny.teacher).byte_lengths()  # the same passes on both ranks
    model = build_student(start(str(tiny.teacher)), torch.device("cpu"), seed=0)
    facts, asked = CacheFacts(model.arch.vocab_size, 8), EvaluationRequest(OBJECTIVE, (surprise, on_label), table)
    wanted = evaluate(model, batches(records, 5), facts, asked=asked, parallel=FLOAT32, world=World())
    run_ranks(2, on_ranks, str(tiny.teacher), records, wanted, table)


def test_several_caches_are_reported_by_name_and_by_their_weights(tiny: Tiny) -> None:
    model, records = build_student(start(str(tiny.teacher)), torch.device("cpu"), seed=0), tiny.records()
    facts = CacheFacts(model.arch.vocab_size, 8)
    parts = {"long": records[:5], "short": records[5:7]}
    asked, alone = EvaluationRequest(OBJECTIVE), {}
    for name, part in parts.items():
        alone[name] = evaluate(model, batches(part, 2), facts, asked=asked, parallel=FLOAT32, world=World())
    held_out = {
        "long": HeldOutCache(lambda: batches(parts["long"], 2), facts, 3.0),
        "short": HeldOutCache(lambda: batches(parts["short"], 2), facts, 1.0),
    }
    found = evaluate_all(model, held_out, asked=asked, parallel=FLOAT32, world=World())
    for name, numbers in alone.items():
        for key, value in numbers.items():
            assert found[key.replace("val/", f"val/{name}/")] == pytest.approx(value)
    for name in ("nll", "kl", "acceptance", "teacher_nll"):
        mean = 0.75 * alone["long"][f"val/{name}"] + 0.25 * alone["short"][f"val/{name}"]
        assert found[f"val/{name}"] == pytest.approx(mean)
    assert found["val/perplexity"] == pytest.approx(math.exp(found["val/nll"]))
    assert found["val/tokens"] == alone["long"]["val/tokens"] + alone["short"]["val/tokens"]


def test_a_metric_that_is_no_number_a_position_is_named(tiny: Tiny) -> None:
    def summed(view: SparseView) -> Tensor:
        return view.student_label.sum()

    model = build_student(start(str(tiny.teacher)), torch.device("cpu"), seed=0)
    facts = CacheFacts(model.arch.vocab_size, 8)
    with pytest.raises(UsageError, match=r"evaluation\.metrics: summed gave \[\] of 7 positions"):
        evaluate(
            model,
            batches(tiny.records(), 2),
            facts,
            asked=EvaluationRequest(OBJECTIVE, (summed,)),
            parallel=FLOAT32,
            world=World(),
        )


def test_a_label_beyond_the_tokenizer_stands_for_no_bytes(tiny: Tiny) -> None:
    """Of a model whose rows go beyond the tokenizer's, as in published ones and converted caches."""
    model, found = build_student(start(str(tiny.teacher)), torch.device("cpu"), seed=0), batches(tiny.records()[:4], 4)
    facts, table = CacheFacts(model.arch.vocab_size, 8), Tokenizer(tiny.teacher).byte_lengths()
    known = len(table) - 20
    labels = [int(label) for batch in found for label in batch.labels[batch.loss_mask]]
    size = sum(int(table[label]) for label in labels if label < known)
    assert any(label >= known for label in labels)
    asked = EvaluationRequest(OBJECTIVE, (), table[:known])
    numbers = evaluate(model, found, facts, asked=asked, parallel=FLOAT32, world=World())
    assert numbers["val/bits_per_byte"] == pytest.approx(
        numbers["val/nll"] * len(labels) / math.log(2) / size, rel=1e-5
    )


def test_batches_are_copied_ahead_and_counted_on_the_host(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Batch] = []

    def noted(found: Iterable[Batch], device: torch.device) -> Iterable[Batch]:
        assert device == World().device
        for batch in found:
            copied.append(batch)
            # Nothing is counted from a copy: a GPU would make the host wait.
            yield replace(batch, label_log_prob=batch.label_log_prob * torch.nan)

    monkeypatch.setattr(evaluation, "device_batches", noted)
    model, found = build_student(start(str(tiny.teacher)), torch.device("cpu"), seed=0), batches(tiny.records()[:4], 2)
    asked = EvaluationRequest(OBJECTIVE, (), Tokenizer(tiny.teacher).byte_lengths())
    facts = CacheFacts(model.arch.vocab_size, 8)
    numbers = evaluate(model, found, facts, asked=asked, parallel=FLOAT32, world=World())
    assert [id(batch) for batch in copied] == [id(batch) for batch in found]
    teacher_nll = -sum(float(batch.label_log_prob[batch.loss_mask].double().sum()) for batch in found)
    scored = sum(int(batch.loss_mask.sum()) for batch in found)
    assert numbers["val/teacher_nll"] == pytest.approx(teacher_nll / scored)
