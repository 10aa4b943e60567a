"""Students that train in part, and layers measured, as commands on the tiny teacher."""

import itertools
import json
from pathlib import Path
from typing import Any

import fiddle as fdl
import peft
import pytest
import torch
import transformers

from experiments.base.measure import measure_model
from experiments.config.config_items import describe, record_json, resolve_items
from experiments.config.saved_students import load_student
from kd_core.parallel.world import World
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.layer_importance import (
    LayerwiseText,
    block_influence,
    drop_greedily,
    nll_with_layers,
    nll_without_each,
)
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training import loop
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from tests.launchers.command import run
from tests.tiny import Tiny


def _lora_items(tiny: Tiny) -> list[str]:
    items = [item.replace("student.", "student.base.") for item in tiny.train_items(8)]
    return ["lora", *items[1:], "student.rank=4", "student.dropout=0.1", "optimizer.lr=1e-2"]


def _numbers(folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in found.items() if not name.startswith("speed/")} for found in lines]


def _train(tiny: Tiny, folder: Path) -> None:
    """As the command does, in this process."""
    resolved = resolve_items(_lora_items(tiny), "Experiment")
    experiment = fdl.build(resolved.config)
    assert "0.0M trained" in experiment.check()["student"]
    folder.mkdir(exist_ok=True)
    RunFolder(folder).claim(record_json(resolved.config), describe(resolved))
    experiment.run(RunFolder(folder), World(), StopSignals())


@pytest.fixture(scope="module")
def adapted_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that train adapters, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    _train(tiny, folder)
    return folder


def test_adapters_interrupted_and_resumed_have_the_same_numbers(
    tiny: Tiny, adapted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout too: its mask follows from the step. (Kills are in test_commands.py.)"""
    steps, real = itertools.count(1), loop.begin_step

    def interrupted(*args: Any, **settings: Any) -> Any:
        if next(steps) == 6:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(loop, "begin_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(tiny, tmp_path)
    assert not (tmp_path / "export").exists()
    _train(tiny, tmp_path)
    assert _numbers(tmp_path) == _numbers(adapted_run)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_learn_and_are_exported_merged_and_alone(tiny: Tiny, adapted_run: Path, tmp_path: Path) -> None:
    numbers = _numbers(adapted_run)
    assert numbers[-1]["val/kl"] < numbers[0]["val/kl"]
    for at in (adapted_run / "checkpoints" / "step_00000008", adapted_run / "export"):
        model, tokenizer = load_student(at, torch.device("cpu"))
        (found,) = measure_model(model, tokenizer, [str(tiny.validation)], "float32", World()).values()
        assert found["kl"] == pytest.approx(numbers[-1]["val/kl"], abs=1e-5)

    again = fdl.build(
        resolve_items(
            [*_lora_items(tiny), f"student.adapter={adapted_run / 'export' / 'adapter'}"], "Experiment"
        ).config
    )
    assert {"student.base.folder", "student.adapter", "shards.path", "evaluation.shards.path"} == set(again.inputs())

    # The base of the adapter is the teacher's layers 0 and 3, frozen: PEFT on it gives the merged folder's logits.
    base = build_student(Pretrained(str(tiny.teacher), keep_layers=(0, 3)), torch.device("cpu"), seed=0)
    save_pretrained(base, tmp_path / "base", tiny.teacher)
    load = transformers.AutoModelForCausalLM.from_pretrained
    beside = peft.PeftModel.from_pretrained(load(tmp_path / "base"), adapted_run / "export" / "adapter").eval()
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert (beside(ids).logits - load(adapted_run / "export").eval()(ids).logits).abs().max() < 1e-4


def test_layers_are_measured_and_the_line_to_use_is_printed(tiny: Tiny, tmp_path: Path) -> None:
    flags = [f"--teacher={tiny.teacher}", f"--cache={tiny.train}", "--row_length=16", "--tokens=512", "--keep=2"]
    out = tmp_path / "measured.json"
    done = run("launchers.importance", *flags, "--dtype=float32", f"--out={out}")
    assert done.returncode == 0, done.stderr
    kept = tuple(json.loads(out.read_text())["keep_layers"])
    assert len(kept) == 2
    assert f"--config='student.keep_layers={kept}'" in done.stdout
    # That line is one that an experiment takes.
    resolved = resolve_items([*tiny.train_items(), f"student.keep_layers={kept}"], "Experiment")
    assert fdl.build(resolved.config).student.architecture().num_layers == 2
    text = tmp_path / "text.txt"
    text.write_text(" ".join(path.read_text() for path in sorted(tiny.corpus.iterdir())))
    plain = run("launchers.importance", flags[0], f"--text={text}", "--measure=alone", "--tokens=256")
    assert "rise of NLL without it" in plain.stdout, plain.stderr


def test_mistakes_of_the_measure_are_one_message(tiny: Tiny) -> None:
    teacher = f"--teacher={tiny.teacher}"
    for flags, message in (
        ([teacher], "wanted either --cache=DIR or --text=FILE"),
        ([teacher, "--cache=s3://a@b/c"], "a URL of s3: not a plain one"),
        ([teacher, f"--cache={tiny.train}", "--keep=4", "--row_length=8"], "--keep=4: wanted 1 to 3"),
    ):
        done = run("launchers.importance", *flags)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_the_nll_without_layers_is_that_of_a_student_without_them(tiny: Tiny) -> None:
    """Held against students that were really built without them, and against every pair that greed could drop."""
    cpu, folder = torch.device("cpu"), str(tiny.teacher)
    tokens = torch.randint(1, 300, (3, 17), generator=torch.Generator().manual_seed(0))

    def nll(kept: tuple[int, ...]) -> float:
        model = build_student(Pretrained(folder, keep_layers=kept), cpu, seed=0)
        positions = torch.arange(16).expand(3, 16)
        with torch.no_grad():
            log_probs = model(tokens[:, :-1], positions, torch.zeros_like(positions)).log_softmax(-1)
        return -log_probs.gather(2, tokens[:, 1:, None]).mean().item()

    with torch.no_grad():
        text = LayerwiseText(build_student(Pretrained(folder), cpu, seed=0), tokens)
    assert nll_with_layers(text, range(4)) == pytest.approx(nll((0, 1, 2, 3)), abs=1e-5)
    for drop in nll_without_each(text, (0, 2, 3)):
        kept = tuple(layer for layer in (0, 2, 3) if layer != drop.layer)
        assert drop.nll == pytest.approx(nll(kept), abs=1e-5)
    told = []
    dropped = drop_greedily(text, 2, told.append)
    assert told == dropped
    singles = {layer: nll(tuple(i for i in range(4) if i != layer)) for layer in range(4)}
    assert dropped[0].layer == min(singles, key=lambda layer: singles[layer])
    left = [layer for layer in range(4) if layer not in {drop.layer for drop in dropped}]
    assert dropped[1].nll == pytest.approx(nll(tuple(left)), abs=1e-5)


def test_influence_is_one_minus_the_cosine(tiny: Tiny) -> None:
    """A layer that adds nothing has none; hooks see the same vectors as the measure."""
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight.zero_()
        model.layers[1].mlp.down_proj.weight.zero_()
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, given, came: seen.append((given[0], came)))
    tokens = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        influence = block_influence(LayerwiseText(model, tokens))
    assert influence[1] == pytest.approx(0, abs=1e-6)
    for found, (given, came) in zip(influence, seen, strict=True):
        dots = (given.double() * came.double()).sum(-1)
        cosine = dots / given.double().norm(dim=-1) / came.double().norm(dim=-1)
        assert found == pytest.approx(1 - cosine.mean().item(), abs=1e-5)
