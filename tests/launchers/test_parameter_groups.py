"""A run with a rate of its own for the embedding, from flags alone."""

from pathlib import Path

import pytest

from kd_core.training.monitoring.metric_log import read_metrics
from tests.launchers.command import configs, run
from tests.tiny import Tiny


def test_a_run_logs_the_rates_of_its_groups(tiny: Tiny, tmp_path: Path) -> None:
    def train(pattern: str, name: str, *flags: str) -> str:
        items = [*tiny.train_items(3), f'optimizer.groups={{"{pattern}": {{"lr_scale": 0.25}}}}']
        return run("launchers.train", *configs(items), f"--run_dir={tmp_path / name}", *flags).stderr

    assert "optimizer.groups: 'embed_token' matches nothing. Near it: embed_tokens" in train(
        "embed_token", "a", "--dry_run"
    )
    train("embed_tokens.*", "b")
    lines = [line for line in read_metrics(tmp_path / "b" / "metrics.jsonl") if "train/lr" in line]
    assert len(lines) == 3
    assert all(line["train/lr/embed_tokens.*"] == pytest.approx(line["train/lr"] / 4) for line in lines)
