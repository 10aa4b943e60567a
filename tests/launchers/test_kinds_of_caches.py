"""Every kind of cache, exported and trained on by the commands."""

from pathlib import Path

import pytest

from kd_core.training.monitoring.metric_log import read_metrics
from tests.launchers.command import configs, run
from tests.tiny import ROW_LENGTH, Tiny

KINDS = {
    "samples": (["selection.top_k=0", "selection.draws=6"], ["loss.terms.kd.tail=sampled"]),
    "head_and_samples": (["selection.top_k=4", "selection.draws=6"], ["loss.terms.kd.tail=sampled"]),
    "its_head": (["selection.top_k=4", "selection.draws=6"], ["shards.samples=False", "shards.top_k=3"]),
    "threshold": (["selection.top_k=16", "selection.min_prob=0.01"], ["shards.min_prob=0.02"]),
    "nucleus": (["selection.top_k=32", "selection.mass=0.9", "codec=compact"], []),
    "tail_at_2": (["selection.top_k=8", "selection.tail_temperatures=(2.0,)"], ["loss.terms.kd.temperature=2.0"]),
    "lossless": (["selection.top_k=8", "codec=lossless"], ["loss.terms.kd.divergence=reverse_kl"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_cache_is_exported_and_trained_on(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    of_export, of_run = KINDS[kind]
    settings = ["quickstart_export", f"corpus.path={tiny.corpus}", f"teacher={tiny.teacher}", "train_tokens=none"]
    settings += ["validation_tokens=none", f"row_length={ROW_LENGTH}", "validation_share=0.2", *of_export]
    done = run("launchers.export_teacher", *configs(settings), f"--out={tmp_path / 'cache'}")
    assert done.returncode == 0, done.stderr
    items = [item for item in tiny.train_items(3) if not item.startswith("shards")]
    items += [f"shards.path={tmp_path / 'cache' / 'train'}", *of_run]
    done = run("launchers.train", *configs(items), f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["val/kl"] < lines[0]["val/kl"], "held-out text lies in a cache of the top 8"
    assert ("val/kd_loss" in lines[-1]) == (kind not in ("samples", "head_and_samples", "tail_at_2"))


def test_a_loss_that_a_cache_cannot_bear_is_refused_before_anything_starts(tiny: Tiny, tmp_path: Path) -> None:
    items = [*tiny.train_items(3), "loss.terms.kd.temperature=2.0"]
    done = run("launchers.train", *configs(items), f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "the cache has the tail at 1.0 only" in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()
