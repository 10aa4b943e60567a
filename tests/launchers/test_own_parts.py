"""A schedule and an optimiser of an experiment's own file: trained with, resumed bit for bit, recorded."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import fiddle as fdl
import pytest

from experiments.base.experiment import Experiment
from experiments.config import config_items, frozen_records
from kd_core.errors import UsageError
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.optimizer import TorchOptimizer
from tests.launchers.command import Command, configs, kill_when, look_in, run, values
from tests.tiny import Tiny

MINE = '''"""An optimiser that is a function, and a schedule that is a class."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import fiddle as fdl
import torch

from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart
from kd_core.training.optimizer import TorchOptimizer


class Lion(torch.optim.Optimizer):
    """Signs of a mean of gradients (arXiv 2302.06675)."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, beta: float) -> None:
        super().__init__(groups, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                kept.lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(group["lr"] * kept.sign())


def lion(groups: Iterable[dict[str, Any]], lr: float, beta: float = 0.9) -> torch.optim.Optimizer:
    """Make it."""
    return Lion(groups, lr, beta)


@dataclass(frozen=True)
class InverseRoot:
    """Rises straight, then falls with the root of the step."""

    warmup_steps: int = 2

    def factor(self, step: int, steps: int) -> float:
        """See `Schedule`."""
        return min(step / self.warmup_steps, (self.warmup_steps / step) ** 0.5)


def signs() -> fdl.Config[Experiment]:
    """The quick start by signs."""
    config = quickstart()
    config.optimizer = fdl.Config(TorchOptimizer, cls=lion, lr=1e-3, settings={"beta": 0.8})
    config.schedule = fdl.Config(InverseRoot, warmup_steps=3)
    return config
'''


def test_they_train_are_resumed_bit_for_bit_and_recorded(user_folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    (user_folder / "user_signs.py").write_text(MINE)
    ours = partial(look_in, user_folder)
    own = ("quickstart", "schedule.", "checkpoint.every")
    items = ["signs", *(item for item in tiny.train_items(6) if not item.startswith(own)), "checkpoint.every=1"]
    flags = configs([*items, "optimizer.settings.beta=0.7"])
    killed = Command("launchers.train", *flags, f"--run_dir={tmp_path / 'killed'}", before=ours)
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert kill_when(killed, (checkpoints / "step_00000002").exists)
    for name in ("killed", "whole"):
        done = run("launchers.train", *flags, f"--run_dir={tmp_path / name}", before=ours)
        assert done.returncode == 0, done.stderr
    assert values(tmp_path / "killed") == values(tmp_path / "whole")
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]
    rates = [line["train/lr"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")[1:]]
    assert rates == [1e-3 * min(step / 3, (3 / step) ** 0.5) for step in range(1, 7)]
    lines = (tmp_path / "whole" / "config.txt").read_text()
    assert "optimizer.cls = experiments.user_signs.lion  # " in lines
    assert "optimizer.settings.beta = 0.7  # --config=optimizer.settings.beta=0.7" in lines
    again = fdl.build(frozen_records.load_record(tmp_path / "whole" / "config.json"))
    assert again.optimizer.settings == {"beta": 0.7}
    assert again.schedule.factor(2, 6) == 2 / 3


def test_those_of_torch_are_checked_with_the_graph(tiny: Tiny, user_folder: Path) -> None:
    (user_folder / "user_torch.py").write_text('''"""Stochastic gradient descent, held and then lowered."""

import fiddle as fdl
from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart
from kd_core.training.optimizer import TorchOptimizer
from kd_core.training.lr_schedule import WarmupStableDecay


def held() -> fdl.Config[Experiment]:
    """The quick start by SGD."""
    config = quickstart()
    config.optimizer = fdl.Config(TorchOptimizer, cls="SGD", lr=0.5, settings={"momentum": 0.9})
    config.schedule = fdl.Config(WarmupStableDecay, warmup_steps=5, decay_steps=12)
    return config
''')
    items = ["held", *tiny.train_items()[1:]]

    def built(*more: str) -> Experiment:
        return fdl.build(config_items.resolve_items([*items, *more], "Experiment").config)

    assert built("fiddler:short", "schedule.decay_steps=1").check()
    refused = {
        "schedule.decay_steps=9": "schedule: warmup_steps 2 + decay_steps 9 is more than steps 6",
        "schedule.decay_steps=-1": "schedule.decay_steps: got -1; wanted at least 0",
        "schedule.shape=round": "wanted one of linear, sqrt",
        "optimizer.settings.momentum=-1": "optimizer.settings: SGD with {'momentum': -1}: Invalid momentum value",
        "optimizer.cls=Sgd": "optimizer.cls: got 'Sgd'; wanted one of ASGD",
    }
    for item, message in refused.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            built(item)
    with pytest.raises(UsageError, match="optimizer.cls: Adafactor runs on one rank only; there are 2"):
        replace(built("schedule.decay_steps=1"), optimizer=TorchOptimizer("Adafactor", 1e-3)).check(2)
