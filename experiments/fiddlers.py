"""Named groups of changes: `--config=fiddler:NAME(arg=v)` applies them to any experiment."""

from typing import Any

import fiddle as fdl

from data.stream.source import Shards
from experiments.base.distill import cache_config
from experiments.base.experiment import Experiment
from kd_core.losses.objective import CrossEntropy, Distillation
from kd_core.students.starts.transformers_start import Transformers
from kd_core.training.lr_schedule import WarmupCosine
from kd_core.training.optimizer import AdamW


def cache(config: fdl.Config[Experiment], folder: str) -> None:
    """Trains on `folder`/train and validates on `folder`/validation, as launchers.export_teacher writes them."""
    for part, split in ((config, "train"), (config.evaluation, "validation")):
        if (
            isinstance(part.shards, fdl.Config) and fdl.get_callable(part.shards) is Shards
        ):  # keeps how much of a cache is read
            part.shards.path = f"{folder}/{split}"
        else:
            part.shards = cache_config(f"{folder}/{split}")


def short(config: fdl.Config[Experiment], steps: int = 2) -> None:
    """Runs only a few steps, to see that everything works: validates before and after them, saves after the last."""
    config.steps = steps
    for name in ("warmup_steps", "constant_steps", "decay_steps"):
        if name in fdl.ordered_arguments(config.schedule, include_defaults=True, include_unset=True):
            setattr(config.schedule, name, int(name == "warmup_steps"))
    config.checkpoint.every = config.evaluation.every = steps


def transformers_student(config: fdl.Config[Experiment], folder: str) -> None:
    """Trains the model in `folder`, of any family, through transformers. Adapters and frozen parameters stay."""
    start = fdl.Config(Transformers, folder=folder)
    outer: Any = config.student
    if not hasattr(outer, "base"):
        config.student = start
        return
    # The base of adapters or frozen parameters may have such a base in turn.
    while hasattr(outer.base, "base"):
        outer = outer.base
    outer.base = start


def nemo_aligner(config: fdl.Config[Experiment]) -> None:
    """Sets NeMo-Aligner's defaults: kd_loss bwd_kl (forward KL on renormalised top-k), AdamW, schedule, keep_best."""
    config.loss.terms = {
        "kd": fdl.Config(Distillation, weight=1.0, divergence="forward_kl", tail="renormalized"),
        "sft": fdl.Config(CrossEntropy, weight=0.0),
    }
    config.optimizer = fdl.Config(AdamW, lr=3e-5, betas=(0.9, 0.98), weight_decay=0.01)
    config.schedule = fdl.Config(WarmupCosine, warmup_steps=10, constant_steps=1000, min_ratio=9e-7 / 3e-5)
    config.checkpoint.keep_best = 5
