"""A file in NeMo-Aligner's format through our conversion and training, with its default settings: the losses of the
first steps against dense float64 arithmetic that reads the file itself and shares no code with ours.

The oracle: transformers' Llama in float64, softmax over the file's raw logits, torch's AdamW, the formulas of
NeMo-Aligner's guide.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

from experiments.config import config_items
from experiments.config.paths import set_path, walk
from tests.launchers.command import Command, configs, kill_when, run
from tests.tiny import Tiny

T, K, EXAMPLES, STEPS = 24, 4, 12, 3
KEPT = (0, 3)
LR, BETAS, DECAY, WARMUP, CLIP = 3e-5, (0.9, 0.98), 0.01, 10, 1.0


def _llama(folder: Path, kept: tuple[int, ...] | None = None) -> LlamaForCausalLM:
    """The folder's model in float64, with all or some of its layers, by transformers alone."""
    config = AutoConfig.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if kept is not None:
        config.num_hidden_layers = len(kept)
        body = {name: value for name, value in weights.items() if ".layers." not in name}
        for new, old in enumerate(kept):
            mark = f"model.layers.{old}."
            body |= {f"model.layers.{new}.{n[len(mark) :]}": v for n, v in weights.items() if n.startswith(mark)}
        weights = body
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model.double().eval()


def write_chunks(teacher: Path, examples: list[list[int]], at: Path, chunks: int = 2) -> list[dict[str, Any]]:
    """NeMo-Aligner's chunked JSONL, as its compute_topk_logits.py leaves it; the first third is the prompt."""
    model = _llama(teacher)
    lines: list[dict[str, Any]] = []
    for index, ids in enumerate(examples):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0]
        best = logits.topk(K, dim=1)
        lines.append(
            {
                "tokens": ids[:-1],
                "labels": ids[1:],
                "loss_mask": [float(t >= len(ids) // 3) for t in range(len(ids) - 1)],
                "topk_logits": best.values.tolist(),
                "topk_token_ids": best.indices.tolist(),
                "log_sum_exp_logits": logits.logsumexp(1).tolist(),
                "index": index,
                "metadata": {"system": "ignored"},
            }
        )
    each = math.ceil(len(lines) / chunks)
    for chunk in range(chunks):
        own = lines[chunk * each : (chunk + 1) * each]
        (at / f"train_{chunk}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    return lines


def _sums(model: LlamaForCausalLM, example: dict[str, Any], reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """KD and SFT loss of an example, summed over its scored positions; both sides renormalised on the top-k."""
    logits = model(torch.tensor([example["tokens"]])).logits[0]
    mask = torch.tensor(example["loss_mask"], dtype=torch.float64)
    p = torch.log_softmax(torch.tensor(example["topk_logits"], dtype=torch.float64), dim=1)
    q = torch.log_softmax(logits.gather(1, torch.tensor(example["topk_token_ids"])), dim=1)
    kd = (q.exp() * (q - p) if reverse else p.exp() * (p - q)).sum(dim=1)
    labels = torch.tensor(example["labels"])
    sft = logits.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]
    return (kd * mask).sum(), (sft * mask).sum()


def oracle(
    student: LlamaForCausalLM, examples: list[dict[str, Any]], weights: tuple[float, float], reverse: bool, steps: int
) -> list[dict[str, float]]:
    """`loss`, `kd_loss`, `sft_loss` of the first steps, each over all examples: means over all scored tokens."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8)
    tokens = sum(sum(example["loss_mask"]) for example in examples)
    found: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        both = [_sums(student, example, reverse) for example in examples]
        kd, sft = (sum(each) / tokens for each in zip(*both, strict=True))
        loss = weights[0] * kd + weights[1] * sft
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LR * step / WARMUP
        optimizer.step()
        found.append({"loss": loss.item(), "kd_loss": kd.item(), "sft_loss": sft.item()})
    return found


@pytest.fixture(scope="module")
def converted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The file of the tiny teacher, converted; and its lines."""
    root = tmp_path_factory.mktemp("nemo")
    random = torch.Generator().manual_seed(0)
    text = [int(i) for record in tiny.records() for i in record.token_ids]
    starts = torch.randint(len(text) - T - 1, (EXAMPLES,), generator=random).tolist()
    lines = write_chunks(tiny.teacher, [text[start : start + T + 1] for start in starts], root)
    flags = ["--format=nemo_aligner", f"--source={root / 'train_CHUNK_ID.jsonl'}", f"--model={tiny.teacher}"]
    done = run("launchers.convert", *flags, "--codec=lossless", f"--out={root / 'cache' / 'train'}")
    assert done.returncode == 0, done.stderr
    return root / "cache" / "train", lines


CASES = {
    "its defaults": ([], (1.0, 0.0), False),
    "kd_loss: fwd_kl, sft_loss_weight: 0.3": (
        ["loss.terms.kd.divergence=reverse_kl", "loss.terms.kd.weight=0.7", "loss.terms.sft.weight=0.3"],
        (0.7, 0.3),
        True,
    ),
}


@pytest.mark.parametrize(("items", "weights", "reverse"), CASES.values(), ids=CASES)
def test_its_settings_give_its_losses(
    tiny: Tiny, tmp_path: Path, converted: tuple[Path, list[dict[str, Any]]], items: list[str],
    weights: tuple[float, float], reverse: bool,
) -> None:  # fmt: skip
    cache, lines = converted
    every_example = [f"tag:RowLength={T}", f"tokens_per_step={T * EXAMPLES}"]  # each fills a row, so a step is all
    settings = [
        "quickstart", f"student.folder={tiny.teacher}", f"student.keep_layers={KEPT}", f"shards.path={cache}",
        f"evaluation.shards.path={cache}", "fiddler:nemo_aligner", *every_example, "parallel.precision=float32",
        "steps=2000", *items,
    ]  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"

    def reached() -> bool:
        return metrics.exists() and metrics.read_text().count("\n") > STEPS

    kill_when(Command("launchers.train", *configs(settings), f"--run_dir={tmp_path / 'run'}"), reached)
    logged = [json.loads(text) for text in metrics.read_text().splitlines()[1 : STEPS + 1]]
    wanted = oracle(_llama(tiny.teacher, KEPT), lines, weights, reverse, STEPS)
    for step, (found, truth) in enumerate(zip(logged, wanted, strict=True), 1):
        assert found["step"] == step
        assert found["train/tokens"] == sum(sum(example["loss_mask"]) for example in lines)
        for name, value in truth.items():
            assert found[f"train/{name}"] == pytest.approx(value, rel=2e-5), (step, name)
    assert wanted[-1]["loss"] < 0.9999 * wanted[0]["loss"], "the steps moved nothing, so they prove nothing"


ROOT = Path(__file__).parent.parent
NAME = re.compile(r"\.?[a-z_]+(\.[a-z_]+)*(=[a-z0-9_/]+)?")


OTHERS = ("launchers.", "metrics.", "progress.")  # commands and files


def _settings_of_the_table() -> list[str]:
    """Returns what the right column of the page's table sets: `a.b`, `a.b=v`, and `.c`, which stands beside `a.b`."""
    table = (ROOT / "docs/coming_from_nemo_aligner.md").read_text().split("\n## Setting by setting\n")[1]
    found: list[str] = []
    for row in table.splitlines():
        beside = ""
        for token in re.findall(r"`([^`]+)`", row.split(" | ")[1]) if " | " in row else []:
            if not NAME.fullmatch(token) or "." not in token or token.startswith(OTHERS):
                continue
            whole = beside + token if token.startswith(".") else token
            beside = whole.split("=")[0].rpartition(".")[0]
            found.append(whole)
    return found


def test_the_table_names_settings_that_are_there() -> None:
    settings = _settings_of_the_table()
    assert len(settings) > 40
    graphs = [config_items.resolve_items([name], kind).config for name, kind in (("quickstart", "Experiment"),
              ("quickstart_export", "TeacherExport"), ("lora", "Experiment"))]  # fmt: skip
    for setting in settings:
        path, _, value = setting.partition("=")
        places = [place for graph in graphs for place in walk(graph) if place.path == path]
        assert places, setting
        if value:
            set_path(graphs[0], f"{path}={value}")
    fdl.build(graphs[0])
