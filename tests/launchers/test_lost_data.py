"""A run whose storage fails: it stops with a message and a checkpoint, and goes on as if nothing had been."""

import shutil
from pathlib import Path

import fiddle as fdl
import pytest
import torch

from data.storage import object_storage
from data.stream.source import Shards
from experiments.config import config_items
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.students.starts.start import build_student
from kd_core.training.checkpoints import checkpoint
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from tests.data.stream.server import serving
from tests.launchers.command import configs, run
from tests.tiny import ROW_LENGTH, Tiny

STEPS = 8


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(object_storage, "FIRST_PAUSE", 0.05)
    monkeypatch.setitem(object_storage.RETRIES, "max_retries", 0)
    monkeypatch.setattr(object_storage.ObjectStorage, "read_ahead", 1)  # the tiny cache would be read at once


def _train(tiny: Tiny, folder: Path, path: str) -> None:
    items = [
        *tiny.train_items(STEPS), f"shards.path={path}", "shards.retry_seconds=0.3", "shards.block_cache=None",
        "checkpoint.every=100", "checkpoint.keep_newest=9", "logger.every=1",
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    fdl.build(config_items.resolve_items(items, "Experiment").config).run(RunFolder(folder), World(), StopSignals())


def _weights(tiny: Tiny, folder: Path) -> list[torch.Tensor]:
    start = fdl.build(config_items.resolve_items(tiny.train_items(STEPS), "Experiment").config).student
    model = build_student(start, torch.device("cpu"), 0)
    checkpoint.load_model(folder / "checkpoints" / f"step_{STEPS:08d}", model)
    return list(model.parameters())


def _losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line}


@pytest.mark.parametrize(("status", "cause"), [(503, "for 0 s: the server answers 503"), (403, "it refuses access")])
def test_a_run_that_loses_its_storage_is_saved_and_goes_on_bit_equal(
    tiny: Tiny, tmp_path: Path, status: int, cause: str
) -> None:
    _train(tiny, tmp_path / "whole", str(tiny.train))
    with serving(tiny.train) as (url, behaviour):
        behaviour.status, behaviour.fails_from = status, 6  # in the second epoch
        with pytest.raises(UsageError, match=rf"shard-\d+.tar: cannot be .*{cause}") as caught:
            _train(tiny, tmp_path / "cut", url)
        step = max(_losses(tmp_path / "cut"))
        assert 0 < step < STEPS
        assert f"Step {step} is saved, and the same command goes on from there." in str(caught.value)
        assert (tmp_path / "cut" / "checkpoints" / f"step_{step:08d}").is_dir()
        behaviour.status = 0
        _train(tiny, tmp_path / "cut", url)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    assert all(map(torch.equal, _weights(tiny, tmp_path / "cut"), _weights(tiny, tmp_path / "whole")))


@pytest.mark.slow
def test_all_ranks_stop_where_one_lacks_data(tiny: Tiny, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(tiny.train, tmp_path / "cache"))
    items = [
        *tiny.train_items(STEPS), "checkpoint.every=100", "logger.every=1", "seed=0",
        f"shards.path={cache}",
    ]  # fmt: skip
    # The block that is needed last is damaged: rank r reads rows r, r + 2, … of each step of four.
    shards, first_needed = Shards(str(cache)), dict[tuple[int, int], tuple[int, int]]()
    order = shards.order(ROW_LENGTH, 0)
    for number in range(4 * STEPS):
        for record in order.row(order.place(number)).records:
            first_needed.setdefault(record[:2], (1 + number // 4, number % 2))
    (shard, block), (step, rank) = max(first_needed.items(), key=lambda item: item[1])
    path = cache / shards.manifest.shards[shard].name
    data = bytearray(path.read_bytes())
    data[shards.manifest.block(shard, block).offset + 600] ^= 1
    path.write_bytes(data)
    ended = run("launchers.train", *configs(items), f"--run_dir={tmp_path / 'run'}", nproc=2)
    assert ended.returncode != 0
    assert step > 2
    place = f"rank {rank}: {path}" if rank else str(path)
    assert f"{place}: damaged: block {block}" in ended.stderr, ended.stderr
    assert f"Step {step - 1} is saved, and the same command goes on from there." in ended.stderr
    assert ended.stderr.count("is saved, and the same command") == 1, "one rank reports"
    assert (tmp_path / "run" / "checkpoints" / f"step_{step - 1:08d}").is_dir()
