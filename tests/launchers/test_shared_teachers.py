"""Exports whose teacher is laid out over ranks, as commands: their bytes, interruptions, and errors on one rank."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.cache.manifest import read_manifest
from data.export.repeatability import SCORED_BY_FILE
from kd_core.students.starts.start import Pretrained, meta_student
from tests.launchers.command import Command, configs, kill_when, run
from tests.patience import patience
from tests.tiny import ROW_LENGTH, Tiny, bytes_of

# Nats between a decoded log-probability under two layouts: where the arithmetic differs by 4e-6, a level of the codec
# may be the next one.
ONE_LEVEL = 0.08


def _flags(tiny: Tiny, out: Path, *changes: str) -> list[str]:
    """The export that made the tiny caches, and changes of it."""
    settings = [
        "quickstart_export", f"corpus.path={tiny.corpus}", f"teacher={tiny.teacher}", "train_tokens=none",
        "validation_tokens=none", "selection.top_k=8", f"row_length={ROW_LENGTH}", "validation_share=0.2",
        "block_positions=128", "shard_bytes=4096", "batch_rows=3", "dtype=float32",
    ]  # fmt: skip
    return [*configs([*settings, *changes]), f"--out={out}"]


def _tars(folder: Path) -> dict[str, bytes]:
    return {name: payload for name, payload in bytes_of(folder).items() if name.endswith((".tar", "plan.json"))}


def test_the_bytes_depend_on_the_tensor_parallel_size_alone(tiny: Tiny, tmp_path: Path) -> None:
    """FSDP gathers the same weights. Groups of two ranks give the same cache, whatever else ranks share."""
    layouts = {
        "full": (2, ["parallel.shard=full"]),
        "tp": (2, ["parallel.tensor_parallel=2"]),
        "tp, full": (4, ["parallel.tensor_parallel=2", "parallel.shard=full"]),
    }
    for name, (ranks, changes) in layouts.items():
        done = run("launchers.export_teacher", *_flags(tiny, tmp_path / name, *changes), nproc=ranks)
        assert done.returncode == 0, done.stderr
        assert "64 positions scored twice differ by 0 nats at most (KL 0)" in done.stderr
    assert _tars(tmp_path / "full") == _tars(tiny.root / "cache")
    assert _tars(tmp_path / "tp") == _tars(tmp_path / "tp, full")
    assert read_manifest(tmp_path / "tp, full" / "train").made["scored_by"] == [
        {"ranks": 4, "tensor_parallel": 2, "shards": 2, "positions": 64, "spread": 0.0, "spread_kl": 0.0}
    ]
    for one, two in zip(tiny.records(), tiny.records(tmp_path / "tp" / "train"), strict=True):
        assert np.array_equal(one.token_ids, two.token_ids)
        assert np.array_equal(one.topk_token_ids, two.topk_token_ids)
        assert np.abs(one.topk_log_probs - two.topk_log_probs).max() < ONE_LEVEL
        assert np.abs(one.tail_log_prob - two.tail_log_prob).max() < ONE_LEVEL


def test_an_export_is_finished_in_another_layout_and_records_both(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = _flags(tiny, out, "parallel.tensor_parallel=2")
    first_shard = out / "train" / "shard-000000.tar"
    kill_when(Command("launchers.export_teacher", *flags, nproc=2), first_shard.exists)
    begun = first_shard.read_bytes()
    shutil.rmtree(out / "validation", ignore_errors=True)
    for name in ("manifest.json", "shard-000001.tar"):
        (out / "train" / name).unlink(missing_ok=True)
    done = run("launchers.export_teacher", *_flags(tiny, out))
    assert done.returncode == 0, done.stderr
    assert first_shard.read_bytes() == begun
    assert (out / "train" / "shard-000001.tar").read_bytes() == (tiny.train / "shard-000001.tar").read_bytes()
    scored_by = read_manifest(out / "train").made["scored_by"]
    assert [start["tensor_parallel"] for start in scored_by][-2:] == [2, 1]
    assert not (out / "train" / SCORED_BY_FILE).exists()


@pytest.mark.parametrize("layout", ["parallel.tensor_parallel=2", "parallel.shard=full"])
def test_an_error_on_the_rank_that_writes_ends_all_ranks(tiny: Tiny, tmp_path: Path, layout: str) -> None:
    flags = _flags(tiny, tmp_path / "out", layout, "max_codec_kl=0.0")
    done = Command("launchers.export_teacher", *flags, nproc=2).done(patience(60))
    assert done.returncode != 0
    assert "max_codec_kl" in done.stderr


@pytest.mark.parametrize(
    ("scorer", "changes", "expected"),
    [
        ("decoder", ["parallel.tensor_parallel=2", "parallel.shard=full"], "1 replicas × 2 shards × 2 tensor-parallel"),
        ("transformers", ["parallel.tensor_parallel=2"], "2 replicas × 1 shards × 2 tensor-parallel"),
    ],
)
def test_a_dry_run_tells_what_a_rank_holds(
    tiny: Tiny, tmp_path: Path, scorer: str, changes: list[str], expected: str
) -> None:
    flags = _flags(tiny, tmp_path / "out", f"scorer={scorer}", *changes)
    done = run("launchers.export_teacher", *flags, "--dry_run", "--world=4")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("teacher: ")]
    numbers = 4 * sum(parameter.numel() for parameter in meta_student(Pretrained(str(tiny.teacher)), None).parameters())
    held = float(re.search("holds ([0-9.e-]+) GB of weights", line)[1]) * 1e9  # type: ignore[index]
    assert expected in line
    # Half of it, or a quarter under FSDP; norms are whole.
    assert 0.9 < held / numbers * (4 if "full" in changes[-1] else 2) < 1.2


def test_a_layout_that_does_not_fit_is_refused_in_a_dry_run(tiny: Tiny, tmp_path: Path) -> None:
    flags = _flags(tiny, tmp_path / "out", "parallel.tensor_parallel=3")
    done = run("launchers.export_teacher", *flags, "--dry_run", "--world=3")
    assert done.returncode != 0
    assert "parallel.tensor_parallel: got 3, which does not divide the model's 4 heads" in done.stderr
    started = run("launchers.export_teacher", *flags, nproc=3)
    (line,) = [line for line in started.stderr.splitlines() if line.startswith("export_teacher: error: ")]
    assert "does not divide the model's 4 heads" in line
    assert "--world: is for --dry_run" in run("launchers.export_teacher", *flags, "--world=3").stderr
