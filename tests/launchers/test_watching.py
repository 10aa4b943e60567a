"""What a run lets a person see, by its command."""

import json
import re
from functools import partial
from pathlib import Path

import fiddle as fdl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from data.tokenizer import Tokenizer
from experiments.config import frozen_records
from kd_core.training.monitoring.metric_log import read_metrics
from launchers.evaluate import format_table
from tests.launchers.command import configs, look_in, run
from tests.tiny import Tiny

MINE = '''"""A user's experiment with a metric of its own, on two held-out caches."""

import fiddle as fdl
from torch import Tensor

from data.stream.source import Mixture
from experiments.base.distill import cache_config
from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart
from kd_core.losses.sparse_view import SparseView


def surprise(view: SparseView) -> Tensor:
    """NLL of the label, in nats."""
    return -view.student_label


def watched_twice(train: str = "", validation: str = "") -> fdl.Config[Experiment]:
    """The quick start, watched."""
    config = quickstart()
    config.evaluation.metrics = (surprise,)
    caches = {"seen": cache_config(train), "held": cache_config(validation)}
    config.evaluation.shards = fdl.Config(Mixture, caches=caches, weights={"seen": 1.0, "held": 3.0})
    return config
'''


def test_a_metric_of_ones_own_on_two_caches_in_a_run_that_is_repeated(
    user_folder: Path, tiny: Tiny, tmp_path: Path
) -> None:
    (user_folder / "user_watched.py").write_text(MINE)
    ours = partial(look_in, user_folder)
    items = [item for item in tiny.train_items(3) if not item.startswith(("quickstart", "evaluation.shards"))]
    first = f'watched_twice(train="{tiny.train}", validation="{tiny.validation}")'
    flags = [*configs([first, *items, "logger.histograms_every=2"]), f"--run_dir={tmp_path / 'run'}", "--profile=1"]
    done = run("launchers.train", *flags, nproc=2, before=ours)
    assert done.returncode == 0, done.stderr
    assert "step 3 of 3: loss " in done.stderr
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    for cache in ("", "seen/", "held/"):
        assert last[f"val/{cache}surprise"] == last[f"val/{cache}nll"]
    experiment = fdl.build(frozen_records.load_record(tmp_path / "run" / "config.json"))
    assert experiment.validation_metrics() == {name for name in last if name.startswith("val/")}
    assert last["val/nll"] == pytest.approx(0.25 * last["val/seen/nll"] + 0.75 * last["val/held/nll"])
    assert "evaluation.metrics = (experiments.user_watched.surprise,)" in (tmp_path / "run" / "config.txt").read_text()
    for rank in (0, 1):
        trace = json.loads((tmp_path / "run" / "profile" / f"rank_{rank}.json").read_text())
        assert any(event.get("name", "").startswith("Optimizer.step") for event in trace["traceEvents"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert {"parameters/norm.weight", "gradients/norm.weight"} <= set(events.Tags()["histograms"])
    assert [event.step for event in events.Histograms("gradients/norm.weight")] == [2, 3]
    prompts = read_metrics(tmp_path / "run" / "continuations.jsonl")[-1]["continuations"]
    assert [type(said) for said in prompts.values()] == [str, str]
    again = run("launchers.train", f"--config=run:{tmp_path / 'run'}", f"--run_dir={tmp_path / 'again'}", before=ours)
    assert again.returncode == 0, again.stderr
    repeated = read_metrics(tmp_path / "again" / "metrics.jsonl")[-1]
    assert "setting evaluation.metrics" not in again.stderr
    assert repeated["val/surprise"] == pytest.approx(last["val/surprise"], rel=1e-4)


def test_a_prompt_without_a_token_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    done = run("launchers.train", *configs([*tiny.train_items(), "evaluation.prompts=('',)"]), f"--run_dir={tmp_path}")
    assert done.returncode != 0
    assert "evaluation.prompts: '' has no token" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_prints_a_table_of_all(tiny: Tiny) -> None:
    done = run("launchers.evaluate", f"--student={tiny.teacher}", f"--cache={tiny.validation}", "--precision=float32")
    assert done.returncode == 0, done.stderr
    rows = {words: float(number) for words, number in (re.split(r"  +", line) for line in done.stdout.splitlines())}
    assert rows["likeliest token is the teacher's"] == rows["likeliest token is among the teacher's five"] == 1
    assert rows["KL(student‖teacher), nats per token"] < 1e-3
    assert {
        "perplexity",
        "bits per byte",
        "expected calibration error",
        "temperature that would calibrate it",
    } <= rows.keys()


def test_evaluate_measures_on_several_caches_and_with_a_users_metric(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    functions = {"surprise": "-view.student_label", "wrong": "1.0", "nll": "1.0", "typo": "view.student_lable"}
    file.write_text("\n\n".join(f"def {name}(view):\n    return {value}" for name, value in functions.items()))
    caches = (f"--cache={tiny.validation}", f"--cache={tiny.train}")
    done = run("launchers.evaluate", f"--student={tiny.teacher}", *caches, f"--metric={file}:surprise", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == [str(tiny.validation), str(tiny.train)]
    for numbers in found.values():
        assert numbers["surprise"] == pytest.approx(numbers["nll"], rel=1e-6)
        assert numbers["nll"] == pytest.approx(numbers["teacher_nll"], abs=2e-3)  # but for the codec
    head, *lines = format_table(found).splitlines()
    assert head.split() == list(found)
    assert lines[0].split()[-2:] == [f"{numbers['nll']:.5f}" for numbers in found.values()]
    assert lines[-1].split()[0] == "surprise"
    for metric, said in {
        "surprize": "no function 'surprize' there. Did you mean 'surprise'?",
        "wrong": "evaluation.metrics: wrong gave float of",
        "typo": "evaluation.metrics: typo: mine.py:11: AttributeError: 'SparseView' object has no attribute",
        "nll": "evaluation.metrics: nll: another metric has this name. Rename it.",
    }.items():
        done = run("launchers.evaluate", f"--student={tiny.teacher}", caches[0], f"--metric={file}:{metric}")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def labels_of(text: str, tokenizer: Tokenizer) -> Tensor:
    return torch.tensor(tokenizer.encode([text])[0])


def test_bytes_of_tokens_add_up_to_the_text(tiny: Tiny) -> None:
    tokenizer = Tokenizer(tiny.teacher)
    lengths = tokenizer.byte_lengths()
    for text in ("The old fox.", "naïve 東京 😀\n\ttabs"):
        assert int(lengths[labels_of(text, tokenizer)].sum()) == len(text.encode())
    assert int(lengths[labels_of("<end>", tokenizer)].sum()) == 0
