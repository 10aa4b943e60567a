"""Models whose weights are padded beyond their tokenizer: padding columns of teacher and student take no probability.

The oracle is transformers in float64, cut to the tokenizer's ids, and dense losses on its logits by autograd.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import fiddle as fdl
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.cache.manifest import read_manifest
from data.cache.selection import Selection
from data.export import export as steps
from data.export.plan import make_plans
from data.export.receipts import write_manifest
from data.export.resume_check import record_or_check_plan
from data.export.teacher_export import TeacherExport
from data.stream.source import Shards
from data.stream.stream import training_steps
from data.teacher.scorer import DecoderScorer
from experiments.base.experiment import Experiment
from experiments.config import config_items
from kd_core.errors import UsageError
from kd_core.files import write_json
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.huggingface.config_json import config_fields
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import Pretrained, Random, build_student
from kd_core.training.step import batch_loss
from tests.kd_core.parallel.test_layouts import whole
from tests.launchers.command import configs, run
from tests.ranks import run_ranks
from tests.reference import dense
from tests.tiny import Tiny, bytes_of, teach, write_caches

V, CPU = 305, torch.device("cpu")


def qwen(tiny: Tiny, folder: Path, rows: int, *, tied: bool) -> Path:
    """A small Qwen2 with the teacher's tokenizer, and padding rows that would take most of the probability."""
    folder.mkdir(parents=True)
    shutil.copy(tiny.teacher / "tokenizer.json", folder)
    arch = Architecture(
        vocab_size=rows, hidden_size=24, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
        rope_theta=1e4, norm_eps=1e-6, tie_embeddings=tied, max_positions=128, qkv_bias=True, family="qwen2",
    )  # fmt: skip
    write_json(folder / "config.json", config_fields(arch, 0, 0))
    model = build_student(Random(str(folder), 24, 32, 2, 4, 2, init_std=0.2), CPU, seed=3)
    teach(model, FastTokenizer.from_file(str(tiny.teacher / "tokenizer.json")), tiny.texts())
    with torch.no_grad():
        model.lm_head.weight[V:] = 3 * model.lm_head.weight[: rows - V].flip(1)
    save_pretrained(model, folder.with_name(f"{folder.name}_made"), folder)
    (folder.with_name(f"{folder.name}_made") / "model.safetensors").rename(folder / "model.safetensors")
    return folder


def padded_copy(source: Path, folder: Path, rows: int, size: float = 3.0) -> Path:
    """The same model with more rows of embedding, of `size` times that of real ones."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    filler = size * embedding[torch.arange(rows - len(embedding)) % len(embedding)].flip(1)
    weights["model.embed_tokens.weight"] = torch.cat([embedding, filler])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "vocab_size": rows})
    return folder


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wide and narrow models of one tokenizer, and the caches of both as teachers."""
    root, tied = tmp_path_factory.mktemp("pair"), request.param == "tied"
    found = {"wide": qwen(tiny, root / "wide", 640, tied=tied), "narrow": qwen(tiny, root / "narrow", 320, tied=tied)}
    for name in list(found):
        write_caches(tiny.export(teacher=str(found[name]), codec="lossless"), root / f"{name}_cache")
        found[f"{name}_cache"] = root / f"{name}_cache"
    return found


def _experiment(tiny: Tiny, student: Path, cache: Path, *items: str) -> Experiment:
    items = (
        *tiny.train_items(), f"student.folder={student}", "student.keep_layers=none", f"shards.path={cache}/train",
        f"evaluation.shards.path={cache}/validation", *items,
    )  # fmt: skip
    return fdl.build(config_items.resolve_items(list(items), "Experiment").config)


def _truth(experiment: Experiment, student: Path) -> tuple[float, dict[str, Tensor]]:
    """Loss sum and gradients of the first step's first batch, by transformers and dense float64 losses."""
    batch = next(_steps(experiment))[0]
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    log_q = torch.empty(*batch.tokens.shape, V, dtype=torch.float64)
    for b, row in enumerate(batch.tokens):
        for document in batch.document_ids[b].unique():
            if document >= 0:
                own = batch.document_ids[b] == document
                log_q[b, own] = model(row[own][None]).logits[0, :, :V].log_softmax(-1)
    teacher = batch.topk_token_ids.flatten(0, 1), batch.topk_log_probs.flatten(0, 1), batch.tail_log_prob.flatten()
    each = dense.positions(log_q.flatten(0, 1), teacher, batch.labels.flatten(), batch.loss_mask.flatten())
    kd = sum(dense.position_loss(position, "forward_kl", "tail_bucket") for position in each)
    total = 0.9 * kd - 0.1 * sum(position.log_q[position.label] for position in each)
    assert isinstance(total, Tensor)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()), {name.removeprefix("model."): gradient for name, gradient in gradients.items()}


def _steps(experiment: Experiment):
    return training_steps(
        experiment.shards, experiment.collate, seed=0, start_row=0, rows_per_step=4, micro_batch=4, rank=0, ranks=1,
        vocab_size=V,
    )  # fmt: skip


def _found(world: World, experiment: Experiment, wanted: tuple[float, dict[str, Tensor]]) -> None:
    world = world.with_layout(experiment.parallel.layout(world.size))
    model = parallelize(experiment.build_on_meta(), experiment.parallel, world)
    experiment.student.fill(model, 0)
    if world.size == 1:
        model.double()
    rtol = 1e-5 if world.size == 1 else 1e-4  # transformers' norms and angles are float32 in any model
    loss = batch_loss(model, next(_steps(experiment))[0], experiment.loss, 1.0).total
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted[0], rel=rtol)
    for name, parameter in model.named_parameters():
        gradient, truth = whole(parameter.grad), wanted[1][name]
        assert (gradient - truth).norm() < rtol * truth.norm(), name
        if parameter.shape[0] > V:
            assert not gradient[V:].any()


DIRECTIONS = [("wide", "narrow"), ("narrow", "wide")]


@pytest.mark.parametrize(("teacher", "student"), DIRECTIONS)
def test_losses_and_gradients_are_those_over_the_real_vocabulary(
    tiny: Tiny, pair: dict[str, Path], teacher: str, student: str
) -> None:
    experiment = _experiment(tiny, pair[student], pair[f"{teacher}_cache"])
    assert "vocabulary 305 in" in experiment.check()["student"]
    wanted = _truth(experiment, pair[student])
    _found(World(), experiment, wanted)
    run_ranks(
        2, _found, _experiment(tiny, pair[student], pair[f"{teacher}_cache"], "parallel.tensor_parallel=2"), wanted
    )


@pytest.mark.parametrize("scorer", ["decoder", "transformers"])
def test_a_padded_teachers_cache_is_over_the_real_vocabulary(
    tiny: Tiny, tmp_path: Path, pair: dict[str, Path], scorer: str
) -> None:
    write_caches(tiny.export(teacher=str(pair["wide"]), codec="lossless", scorer=scorer), tmp_path)
    manifest = read_manifest(tmp_path / "train")
    assert (manifest.vocab_size, manifest.plans[0]["vocab_size"]) == (V, V)
    assert manifest.teacher["architecture"]["padded_vocab_size"] == 640
    model = AutoModelForCausalLM.from_pretrained(pair["wide"], dtype=torch.float64)
    most_padding = 0.0
    for record in tiny.records(tmp_path / "train"):
        tokens = torch.from_numpy(record.token_ids.astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0]
        most_padding = max(most_padding, float(logits.softmax(-1)[:, V:].sum(-1).max()))
        truth = logits[:, :V].log_softmax(-1)
        labels = truth.gather(1, tokens[1:, None]).squeeze(1)
        assert np.abs(truth.topk(8).values.numpy() + np.sort(-record.topk_log_probs, axis=1)).max() < 1e-4
        assert np.abs(truth.topk(V).values[:, 8:].logsumexp(1).numpy() - record.tail_log_prob).max() < 1e-4
        assert np.abs(labels.numpy() - record.label_log_prob).max() < 1e-4
    assert most_padding > 0.9


def test_padding_changes_no_bit_of_what_a_teacher_says(tiny: Tiny, tmp_path: Path) -> None:
    teacher = padded_copy(tiny.teacher, tmp_path / "padded", 320)
    write_caches(tiny.export(teacher=str(teacher)), tmp_path / "cache")
    found, plain = (bytes_of(folder) for folder in (tmp_path / "cache", tiny.root / "cache"))
    names = [name for name in plain if name.endswith(".tar")]
    assert len(names) > 2
    assert {name: found[name] for name in names} == {name: plain[name] for name in names}
    assert "vocab_size" not in json.loads(plain["train/plan.json"])


def test_a_padded_student_trains_and_its_export_never_says_padding(
    tiny: Tiny, tmp_path: Path, pair: dict[str, Path]
) -> None:
    items = [
        *tiny.train_items(steps=4), f"student.folder={pair['wide']}", "student.keep_layers=none",
        f"shards.path={pair['narrow_cache']}/train", f"evaluation.shards.path={pair['narrow_cache']}/validation",
    ]  # fmt: skip
    run("launchers.train", *configs(items), "--run_dir=run", cwd=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert model.get_input_embeddings().weight.shape[0] == 640
    with torch.no_grad():
        probs = model(torch.arange(V)[None]).logits[0].double().softmax(-1)
    assert (probs[:, V:] <= probs[:, :V].mean(-1, keepdim=True) * 1.0001).all()
    assert (probs.argmax(-1) < V).all()
    said = run("launchers.evaluate", "--student=run", f"--cache={pair['narrow_cache']}/validation", cwd=tmp_path).stdout
    (nll,) = (float(line.split()[-1]) for line in said.splitlines() if line.startswith("NLL"))
    labels: list[Tensor] = []
    for record in tiny.records(pair["narrow_cache"] / "validation"):
        tokens = torch.from_numpy(record.token_ids.astype(np.int64))
        with torch.no_grad():
            truth = model(tokens[None, :-1]).logits[0, :, :V].double().log_softmax(-1)
        labels.append(truth.gather(1, tokens[1:, None]).squeeze(1))
    assert nll == pytest.approx(-float(torch.cat(labels).mean()), abs=2e-5)


def test_a_student_without_rows_for_all_tokens_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(tiny.teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "vocab_size": 300})
    with pytest.raises(
        UsageError, match=r"student.folder: .*small has an embedding of 300 rows .* and 305 tokens are used"
    ):
        _experiment(tiny, folder, tiny.root / "cache").check()


def _as_before(export: TeacherExport, out: Path, rows: int) -> None:
    """Caches as they were written when all rows of a head counted as tokens."""
    model = DecoderScorer(build_student(Pretrained(export.teacher), CPU, seed=0))
    for plan in make_plans(export, out):
        older = {name: value for name, value in plan.identity.items() if name != "vocab_size"}
        plan = replace(plan, teacher=plan.teacher._replace(vocab_size=rows), identity=older)  # noqa: PLW2901
        record_or_check_plan(plan)
        steps.write_missing_shards(plan, model, steps.make_tables(plan, model), 0, 1)
        write_manifest(plan)


def test_an_older_cache_with_padding_among_its_entries_is_read(tiny: Tiny, tmp_path: Path) -> None:
    teacher = padded_copy(tiny.teacher, tmp_path / "padded", 308, size=0.2)
    export = tiny.export(teacher=str(teacher), codec="lossless", selection=Selection(top_k=304))
    _as_before(export, tmp_path / "cache", 308)
    shards = Shards(str(tmp_path / "cache" / "train"))
    assert shards.manifest.vocab_size == 308
    shards.check(V, shards.manifest.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    moved = 0.0
    for record in tiny.records(tmp_path / "cache" / "train"):
        read, tokens = shards.cut(record, V), torch.from_numpy(record.token_ids.astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0]
        moved = max(moved, float(logits.softmax(-1)[:, V:].sum(-1).max()))
        truth = logits[:, :V].log_softmax(-1)
        used = torch.from_numpy(read.topk_log_probs > -np.inf)
        ids = torch.from_numpy(read.topk_token_ids.astype(np.int64))
        assert int(ids.max()) < V
        assert int(used.sum(1).min()) >= 301
        error = truth.gather(1, ids) - torch.from_numpy(read.topk_log_probs)
        assert float(error[used].abs().max()) < 1e-4
        labels = truth.gather(1, tokens[1:, None]).squeeze(1).numpy()
        assert np.abs(labels - read.label_log_prob).max() < 1e-4
    assert moved > 1e-3
    assert all(record_or_check_plan(plan) for plan in make_plans(export, tmp_path / "cache"))  # complete, and so reused
    (tmp_path / "cache" / "train" / "manifest.json").unlink()
    with pytest.raises(UsageError, match="an earlier version began"):
        record_or_check_plan(make_plans(export, tmp_path / "cache")[0])


def test_an_older_cache_of_a_teacher_that_says_padding_is_refused(
    tiny: Tiny, tmp_path: Path, pair: dict[str, Path]
) -> None:
    _as_before(tiny.export(teacher=str(pair["wide"])), tmp_path, 640)
    with pytest.raises(UsageError, match=r"ids from 305 on have a probability of 0\.[789].*vocabulary of 640"):
        _experiment(tiny, pair["narrow"], tmp_path).check()
