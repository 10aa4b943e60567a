"""Runs of students of transformers: trained, resumed bit by bit, exported, and read again by transformers."""

import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch
import transformers

from data.stream.collate import Collate
from data.stream.source import Shards
from data.stream.stream import all_batches
from data.tokenizer import Tokenizer
from experiments.base.measure import measure_model
from experiments.config.config_items import resolve_items
from experiments.config.saved_students import find_student, load_student
from kd_core.errors import UsageError
from kd_core.losses.objective import Auxiliary
from kd_core.parallel.world import World
from kd_core.training.monitoring.metric_log import read_metrics
from tests.kd_core.students.transformers_models import save_folder
from tests.launchers.test_saved_students import train
from tests.tiny import Tiny

MOST_MENTIONED = (
    "qwen 3 next", "qwen 3.5", "nemotron h", "gpt-oss", "deepseek 3", "gemma 3", "phi 3", "glm 4", "qwen 3 moe",
    "olmo 2", "smollm 3",
)  # fmt: skip
slow = pytest.mark.slow


def model_folder(tiny: Tiny, name: str, folder: Path) -> Path:
    """A random model with the tiny teacher's tokenizer, and more rows than that has tokens."""
    save_folder(name, folder, vocab_size=330)
    for path in tiny.teacher.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def items(tiny: Tiny, folder: Path, *more: str) -> list[str]:
    settings = [item for item in tiny.train_items(3) if not item.startswith("student.")]
    often = ["checkpoint.every=1", "checkpoint.keep_newest=9", "checkpoint.export=best", "evaluation.every=1"]
    prompts = ["evaluation.prompts=('The old fox',)", "evaluation.continuation_tokens=3"]
    return [*settings, f'fiddler:transformers_student(folder="{folder}")', *often, *prompts, *more]


def negative_log_likelihood(folder: Path, cache: Path) -> float:
    """That of transformers' own model, document by document, in nats per scored token."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shards, total, count = Shards(str(cache)), 0.0, 0
    share = {"rank": 0, "ranks": 1, "vocab_size": Tokenizer(folder).vocab_size}
    for batch in all_batches(shards, Collate(shards.manifest.row_length), micro_batch=1, **share):
        for number in range(int(batch.document_ids.max()) + 1):
            here = batch.document_ids[0] == number
            with torch.no_grad():
                log_q = model(batch.tokens[:, here]).logits[0, :, : share["vocab_size"]].log_softmax(dim=-1)
            scored, labels = batch.loss_mask[0, here], batch.labels[0, here]
            total -= float(log_q[scored].gather(1, labels[scored][:, None]).sum())
            count += int(scored.sum())
    return total / count


@pytest.mark.parametrize(
    "name", ["qwen 3 next", *(pytest.param(name, marks=slow) for name in MOST_MENTIONED if name != "qwen 3 next")]
)
def test_trained_resumed_exported_and_read_again(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = model_folder(tiny, name, tmp_path / "model")
    run = train(tmp_path / "run", items(tiny, folder))
    lines = read_metrics(run.path / "metrics.jsonl")
    losses = [line["val/nll"] for line in lines if "val/nll" in line]
    assert losses[-1] < losses[0]
    # Killed after its second step: the third has the same bits.
    resumed = tmp_path / "resumed"
    shutil.copytree(run.path, resumed, ignore=shutil.ignore_patterns("step_00000003", "export"))
    train(resumed, items(tiny, folder))
    name_of_weights = "export/model.safetensors"
    assert (resumed / name_of_weights).read_bytes() == (run.path / name_of_weights).read_bytes()
    again = read_metrics(resumed / "metrics.jsonl")
    assert [(line["step"], line.get("train/loss")) for line in again] == [
        (line["step"], line.get("train/loss")) for line in lines
    ]
    # The export, measured by us and by transformers.
    model, tokenizer_folder = load_student(find_student(run.path, None), torch.device("cpu"))
    measured = measure_model(model, tokenizer_folder, [str(tiny.validation)], "float32", World())[str(tiny.validation)]
    assert measured["nll"] == pytest.approx(negative_log_likelihood(run.export, tiny.validation), rel=1e-4)
    assert measured["nll"] == pytest.approx(min(losses), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["nll"]), rel=1e-5)


@slow
def test_adapters_of_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    folder = model_folder(tiny, "qwen 3 moe", tmp_path / "model")
    more = ["student.rank=2", "student.targets=('q_proj', 'v_proj')"]
    lora = ["lora" if item == "quickstart" else item for item in items(tiny, folder, *more)]
    run = train(tmp_path / "run", lora)
    assert (run.export / "adapter" / "adapter_model.safetensors").exists()
    model, _ = load_student(run.checkpoints / "step_00000002", torch.device("cpu"))
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 8


def test_layouts_and_terms_that_it_cannot_have(tiny: Tiny, tmp_path: Path) -> None:
    dense, experts = (model_folder(tiny, name, tmp_path / name) for name in ("phi 3", "qwen 3 moe"))
    for folder, fails in ((dense, pytest.raises(UsageError, match=r"loss\.terms\.balance")), (experts, nullcontext())):
        config: Any = resolve_items(items(tiny, folder), "Experiment").config
        config.loss.terms["balance"] = fdl.Config(Auxiliary, weight=0.01)
        with fails:
            assert "layout" in fdl.build(config).check(ranks=4)
    divided: Any = fdl.build(resolve_items(items(tiny, dense, "parallel.tensor_parallel=2"), "Experiment").config)
    with pytest.raises(UsageError, match=r"tensor_parallel: Phi3ForCausalLM .* parallel\.shard=full, or take a family"):
        divided.check(ranks=2)
