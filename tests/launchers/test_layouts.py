"""Layouts by the command: trained on four ranks, stopped, and resumed on other layouts; dry runs of any world."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_core.training.metrics import read_metrics
from tests.launchers.command import configs, run
from tests.tiny import Tiny

FOUR = ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "parallel.shard=full"]


def _train(tiny: Tiny, folder: Path, layout: list[str], nproc: int | None, *flags: str) -> str:
    items = [*tiny.train_items(6), "checkpoint.keep_newest=9", *layout]
    done = run("launchers.train", *configs(items), f"--run_dir={folder}", *flags, nproc=nproc)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]


def test_saved_on_four_ranks_and_resumed_on_any_other_layout(tiny: Tiny, tmp_path: Path) -> None:
    """Stopped after four of six steps on dp 2 × tp 2; the last two on tp 4, dp 4 and one process."""
    _train(tiny, tmp_path / "one", [], None)
    _train(tiny, tmp_path / "four", FOUR, 4)
    wanted = _losses(tmp_path / "one")
    assert _losses(tmp_path / "four") == pytest.approx(wanted, rel=1e-5)
    weights = load_file(tmp_path / "one" / "export" / "model.safetensors")
    others: dict[str, tuple[list[str], int | None]] = {
        "tp 4": (["parallel.tensor_parallel=4"], 4),
        "dp 4": (["parallel.shard=gradients"], 4),
        "alone": ([], None),
    }
    for name, (layout, nproc) in others.items():
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        for part in ("config.json", "config.txt", "metrics.jsonl"):
            (folder / part).write_bytes((tmp_path / "four" / part).read_bytes())
        (tmp_path / "four" / "checkpoints" / "step_00000004").rename(folder / "checkpoints" / "step_00000004")
        said = _train(tiny, folder, layout, nproc)
        assert "resumed with another layout: parallel.tensor_parallel is 2 there" in said
        assert "4 of 6 steps are done" in said
        assert _losses(folder) == pytest.approx(wanted, rel=1e-5)
        found = load_file(folder / "export" / "model.safetensors")
        for parameter, value in weights.items():
            assert torch.allclose(found[parameter], value, rtol=1e-4, atol=1e-5), (name, parameter)
        attempt = json.loads((folder / "attempts" / "001" / "attempt.json").read_text())
        assert attempt["changed"]["parallel.tensor_parallel"].startswith("2 there")
        (folder / "checkpoints" / "step_00000004").rename(tmp_path / "four" / "checkpoints" / "step_00000004")


def test_another_precision_is_another_experiment(tiny: Tiny, tmp_path: Path) -> None:
    _train(tiny, tmp_path / "run", [], None)
    items = [*tiny.train_items(6), "checkpoint.keep_newest=9", "parallel.precision=bfloat16"]
    done = run("launchers.train", *configs(items), f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "parallel.precision is 'float32' there, 'bfloat16' now" in done.stderr


def test_a_dry_run_tells_what_a_rank_of_any_world_holds(tiny: Tiny) -> None:
    items = [*tiny.train_items(6), *FOUR]
    done = run("launchers.train", *configs(items), "--dry_run", "--world=512")
    assert done.returncode == 0, done.stderr
    assert "512 ranks: 1 replicas × 256 shards × 2 tensor-parallel" in done.stdout
    assert "checkpoints: runs/quickstart/checkpoints" in done.stdout
    refused = run("launchers.train", *configs(items), "--dry_run", "--world=7")
    assert "7 ranks are not divided by it" in refused.stderr
    refused = run("launchers.train", *configs([*items, "parallel.tensor_parallel=3"]), "--dry_run", "--world=6")
    assert "Fitting: 1, 2, 4" in refused.stderr
