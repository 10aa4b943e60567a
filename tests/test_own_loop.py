"""The example of a loop of one's own trains as the command does, and imports the public surface alone."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from kd_core.training.monitoring.metric_log import read_metrics
from tests.launchers.command import run
from tests.tiny import ROW_LENGTH, Tiny

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_loop.py"


def _example() -> object:
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_a_transformers_model_as_the_command_trains_our_decoder(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    losses = _example().train(str(tiny.teacher), str(tiny.train), 3, 4, ROW_LENGTH)  # type: ignore[attr-defined]
    items = [
        *tiny.train_items(3), "student.keep_layers=None", "schedule.warmup_steps=0", "schedule.min_ratio=1.0",
        "optimizer.lr=0.0004", "optimizer.betas=(0.9, 0.999)", "optimizer.weight_decay=0.01", "optimizer.clip_norm=0",
    ]  # fmt: skip
    arguments = [f"--config={item}" for item in items]
    assert run("launchers.train", *arguments, f"--run_dir={tmp_path / 'run'}").returncode == 0
    ours = [line["train/loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    # Weight decay is on matrices alone there, which a few steps do not show.
    assert losses == pytest.approx(ours, rel=1e-4)


def test_it_imports_what_the_page_of_the_library_names() -> None:
    page = (EXAMPLE.parent.parent / "docs" / "library.md").read_text()
    for node in ast.parse(EXAMPLE.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("kd_core", "data"):
            for name in node.names:
                assert f"`{node.module}.{name.name}`" in page, f"{node.module}.{name.name} is not on the page"
