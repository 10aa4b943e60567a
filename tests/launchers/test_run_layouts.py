"""Layouts by the command: trained on four ranks, stopped, and resumed on other layouts; dry runs of any world."""

import json
import platform
import subprocess
from pathlib import Path

import fiddle as fdl
import pytest
import torch
from safetensors.torch import load_file

from experiments.config import config_items
from kd_core.errors import UsageError
from kd_core.parallel.config import LAYOUT_SETTINGS
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder
from tests.forks import ENVIRONMENT
from tests.launchers.command import configs, line, run
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
    """What may change on the way is the layout, and nothing else."""
    may_change = frozenset(f"parallel.{name}" for name in LAYOUT_SETTINGS)
    folder = RunFolder(tmp_path)

    def claim(*changes: str) -> dict[str, str]:
        resolved = config_items.resolve_items([*tiny.train_items(), *changes], "Experiment")
        return folder.claim(config_items.record_json(resolved.config), config_items.describe(resolved), may_change)

    assert claim() == claim() == {}
    assert claim("parallel.shard=full") == {"parallel.shard": "'gradients' there, 'full' now"}
    with pytest.raises(
        UsageError, match=r"another experiment \(parallel.precision is 'float32' there, 'bfloat16' now\)"
    ):
        claim("parallel.shard=full", "parallel.precision=bfloat16")


def test_the_precision_of_the_first_start_is_recorded_and_kept(tiny: Tiny, tmp_path: Path) -> None:
    """Begun where torch is held to AVX2, gone on with on this machine."""
    items = [*tiny.train_items(2), "parallel.precision=auto"]
    flags = [*configs(items), f"--run_dir={tmp_path}"]
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # read when torch is imported
    command = line("launchers.train", *flags)
    first = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | limits, check=False)
    assert first.returncode == 0, first.stderr
    taken = RunFolder(tmp_path).precision()
    assert f"precision: {taken} (auto: this CPU (" in first.stderr
    assert f"parallel.precision = '{taken}'  # auto: this CPU (" in (tmp_path / "config.txt").read_text()
    if platform.machine() == "x86_64":
        assert taken == "float32"
    second = run("launchers.train", *flags)
    assert second.returncode == 0, second.stderr
    assert f"precision: {taken} (as recorded in the run)" in second.stderr
    assert "already complete" in second.stderr


def test_a_dry_run_tells_what_a_rank_of_any_world_holds(tiny: Tiny) -> None:
    items = [*tiny.train_items(6), *FOUR]
    done = run("launchers.train", *configs(items), "--dry_run", "--world=512")
    assert done.returncode == 0, done.stderr
    assert "512 ranks: 1 replicas × 256 shards × 2 tensor-parallel" in done.stdout
    assert "checkpoints: runs/quickstart/checkpoints" in done.stdout


@pytest.mark.parametrize(("change", "ranks", "said"), [
    ("parallel.tensor_parallel=2", 7, "7 ranks are not divided by it. Start a multiple of 2"),
    ("parallel.tensor_parallel=3", 6, "does not divide the model's 4 heads.*Fitting: 1, 2, 4"),
    ("parallel.replicas=3", 8, "make 4, which is not divided by it. Take one of 1, 2, 4"),
    ("collate.multiple=3", 4, "rows of 33 positions are not divided by tensor_parallel 2"),
    ("parallel.context_parallel=3", 8, "make 4, which is not divided by it. Start a multiple of 6 ranks"),
    ("parallel.context_parallel=3", 12, "rows of a multiple of 6 positions; they have 32. Set collate.multiple=6"),
    ("parallel.context_parallel=32", 64, "rows of a multiple of 64 positions; they have 32"),
])  # fmt: skip
def test_layouts_that_do_not_fit(tiny: Tiny, change: str, ranks: int, said: str) -> None:
    config = config_items.resolve_items([*tiny.train_items(6), *FOUR, change], "Experiment").config
    with pytest.raises(UsageError, match=said):
        fdl.build(config).check(ranks)


def test_cuda_graphs_take_one_pass_a_step(tiny: Tiny) -> None:
    items = [*tiny.train_items(6), "parallel.compile=true", "parallel.cuda_graphs=true"]
    rows = fdl.build(config_items.resolve_items(items, "Experiment").config).rows_per_step
    few, enough = (
        fdl.build(config_items.resolve_items([*items, f"parallel.micro_batch_rows={n}"], "Experiment").config)
        for n in (rows - 1, rows)
    )
    with pytest.raises(UsageError, match=rf"got 2 passes a step .*parallel\.micro_batch_rows={rows}, or"):
        few.check(1)
    enough.check(1)
