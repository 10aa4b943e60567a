"""Export, training, a stop, a resumption and the export of the student through the commands, on the machine's GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_core.training.monitoring.metric_log import read_metrics
from tests.launchers.command import configs
from tests.tiny import Tiny

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
ROOT = Path(__file__).parent.parent.parent


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]


def test_train_resume_and_export(tiny: Tiny, tmp_path: Path) -> None:
    items = ["parallel.precision=bfloat16", "checkpoint.keep_newest=9"]
    run("launchers.train", *configs([*tiny.train_items(6), *items]), f"--run_dir={tmp_path / 'whole'}")
    # The same run, of which only the first four steps are there.
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "config.txt", "metrics.jsonl"):
        (resumed / name).write_bytes((whole / name).read_bytes())
    (whole / "checkpoints" / "step_00000004").rename(resumed / "checkpoints" / "step_00000004")
    log = run("launchers.train", *configs([*tiny.train_items(6), *items]), f"--run_dir={resumed}")
    assert "4 of 6 steps are done" in log
    # Gradients are added by atomics on a GPU, in no fixed order.
    assert losses(resumed) == pytest.approx(losses(whole), rel=2e-3)
    assert losses(whole)[-1] < losses(whole)[0]
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (whole, resumed)]
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=5e-2, atol=5e-3), name
    # The student scores a held-out cache again.
    run("launchers.evaluate", f"--student={whole}", f"--cache={tiny.validation}")


def test_export_of_a_teacher(tiny: Tiny, tmp_path: Path) -> None:
    items = ["quickstart_export", f"teacher={tiny.teacher}", f"corpus.path={tiny.corpus}", "row_length=32"]
    items += ["selection.top_k=8", "train_tokens=None", "validation_tokens=None"]
    run("launchers.export_teacher", *configs(items), f"--out={tmp_path / 'cache'}")
    run("launchers.inspect", str(tmp_path / "cache" / "train"), "--verify")
