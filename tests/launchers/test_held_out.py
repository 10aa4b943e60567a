"""Several held-out caches without weights: the first decides, the others are reported. A diverged student is, too."""

import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest

from data.stream.source import Mixture, Shards
from experiments.base import experiment
from experiments.base.experiment import Experiment
from experiments.config import config_items, frozen_records
from experiments.fiddlers import cache
from kd_core.errors import NonFiniteError, UsageError
from kd_core.parallel.world import World
from kd_core.training.checkpoints import checkpoint
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder
from kd_core.training.stop_signals import StopSignals
from tests.tiny import Tiny


def _config(tiny: Tiny, shards: Any, *items: str) -> fdl.Config[Experiment]:
    config = config_items.resolve_items([*tiny.train_items(4), "evaluation.prompts=()", *items], "Experiment").config
    config.evaluation.shards = shards
    return config


def _caches(tiny: Tiny) -> dict[str, fdl.Config[Shards]]:
    """The training cache as another domain; its name comes before the main one's in the alphabet."""
    return {"held": fdl.Config(Shards, path=str(tiny.validation)), "code": fdl.Config(Shards, path=str(tiny.train))}


def _run(config: fdl.Config[Experiment], folder: Path) -> list[dict[str, float]]:
    """Train by the record of a config, and give the validations."""
    folder.mkdir()
    (folder / "config.json").write_text(config_items.record_json(config))
    fdl.build(frozen_records.load_record(folder / "config.json")).run(RunFolder(folder), World(), StopSignals())
    return [line for line in read_metrics(folder / "metrics.jsonl") if "val/nll" in line]


def test_the_first_is_what_the_run_has_alone_and_the_others_what_they_have_alone(tiny: Tiny, tmp_path: Path) -> None:
    caches = _caches(tiny)
    config = _config(tiny, caches, "checkpoint.keep_newest=9")
    both = _run(config, tmp_path / "both")
    for name, at in (("held", ""), ("held", "held/"), ("code", "code/")):
        alone = _run(_config(tiny, caches[name]), tmp_path / f"{name} {at.strip('/')}")
        for line, wanted in zip(both, alone, strict=True):
            found = {key.replace(f"val/{at}", "val/"): value for key, value in line.items()}
            own = {key: value for key, value in wanted.items() if key.startswith("val/")}
            assert {key: found[key] for key in own} == own
    built = fdl.build(config)
    assert built.validation_metrics() == {name for name in both[0] if name.startswith("val/")}
    assert re.match(
        r"\d+ positions of held, \d+ positions of code \(only reported\)$", built.check()["validation cache"]
    )
    assert {"evaluation.shards.held.path", "evaluation.shards.code.path"} <= built.inputs().keys()
    assert "evaluation.shards.code.path = " in (text := config_items.describe(config_items.Resolved(config, "two")))
    assert text.index("evaluation.shards.held") < text.index("evaluation.shards.code")
    folders = sorted((tmp_path / "both" / "checkpoints").iterdir())
    best = {int(path.name[5:]): checkpoint.read_progress(path).metric for path in folders}
    assert best[4] == both[-1]["val/loss"] == both[-1]["val/held/loss"] != both[-1]["val/code/loss"]


def test_a_name_of_one_may_be_the_best_ones(tiny: Tiny) -> None:
    config = _config(tiny, _caches(tiny), "checkpoint.best_metric=val/code/kl")
    assert fdl.build(config).check()
    cache(config, str(tiny.root / "cache"))
    assert config.evaluation.shards.path == str(tiny.validation)
    with pytest.raises(UsageError, match="best_metric: got 'val/code/kl'; wanted one of val/"):
        fdl.build(config).check()


@pytest.mark.parametrize("shards", [{}, {"a/b": Shards("x")}, {"a": Mixture({"b": Shards("x")}, {"b": 1.0})}])
def test_other_dictionaries_are_refused(tiny: Tiny, shards: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="evaluation.shards: got .*; wanted Shards, a Mixture, or a dictionary"):
        fdl.build(_config(tiny, shards))


def test_a_diverged_student_is_told_with_its_step_and_its_checkpoint_is_kept(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After one step of such a rate, products of its weights are beyond float32."""
    items = ("optimizer.lr=1e10", "schedule.warmup_steps=0", "tag:Interval=1", "checkpoint.best_metric=val/nll")
    config = _config(tiny, fdl.Config(Shards, path=str(tiny.validation)), *items)
    with caplog.at_level(logging.WARNING, "kd"), pytest.raises(NonFiniteError, match="step 2: "):
        _run(config, tmp_path / "run")
    assert re.search(r"validation at step 1: loss, .*nll.* not finite: the student has diverged", caplog.text)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1]
    assert math.isfinite(lines[0]["val/temperature"])
    assert math.isnan(lines[1]["val/nll"])
    assert math.isnan(lines[1]["val/temperature"])
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    assert checkpoint.find_damage(folder) == []
    assert math.isnan(checkpoint.read_progress(folder).metric or 0.0)


def test_a_run_that_began_in_another_order_of_rows_is_resumed_with_a_warning(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = ["schedule.warmup_steps=1", "checkpoint.export=last"]
    monkeypatch.setattr(experiment, "ORDER_VERSION", 1)
    _run(_config(tiny, _caches(tiny)["held"], "steps=2", *items), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    longer = fdl.build(_config(tiny, _caches(tiny)["held"], "steps=4", *items))
    for version, warned in ((2, True), (2, False)):
        caplog.clear()
        monkeypatch.setattr(experiment, "ORDER_VERSION", version)
        longer.run(RunFolder(tmp_path / "run"), World(), StopSignals())
        assert ("rows came in an order of version 1, and come in one of version 2" in caplog.text) == warned
        shutil.rmtree(tmp_path / "run" / "export")
    assert checkpoint.read_progress(tmp_path / "run" / "checkpoints" / "step_00000004").order == 2
