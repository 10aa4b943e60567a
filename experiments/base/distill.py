"""The base of all experiments: every part is named once, and values that must agree are tagged.

Command:  torchrun --nproc-per-node 1 -m launchers.train --config='distill(model="my/model", cache="my/cache")'
Expected: a run that makes sense before anything is tuned. An experiment sets what its question needs.
Seen:     as `quickstart`, which is this graph with seven values changed.
"""

import fiddle as fdl

from data.stream.collate import Collate
from data.stream.source import Shards
from experiments.base.experiment import Experiment
from experiments.base.parts import Evaluation
from experiments.tags import Interval, RowLength, TopK
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.parallel.config import Parallel
from kd_core.students.starts.start import Pretrained
from kd_core.training.checkpoints.checkpoint_settings import Checkpoint
from kd_core.training.lr_schedule import WarmupCosine
from kd_core.training.optimizer import AdamW
from kd_core.training.run_settings import Logger


def cache_config(path: str) -> fdl.Config[Shards]:
    """Returns the config of a cache that is read as a whole."""
    config = fdl.Config(Shards, path=path)
    fdl.add_tag(config, "top_k", TopK)
    return config


def distill(model: str = "my/model", cache: str = "my/cache") -> fdl.Config[Experiment]:
    """Trains a whole model on `cache`/train, validates on `cache`/validation: 0.9 forward KL + 0.1 cross-entropy."""
    config = fdl.Config(
        Experiment,
        student=fdl.Config(Pretrained, folder=model),
        shards=cache_config(f"{cache}/train"),
        collate=fdl.Config(Collate, row_length=512),
        loss=fdl.Config(
            Objective,
            terms={"kd": fdl.Config(Distillation, weight=0.9), "sft": fdl.Config(CrossEntropy, weight=0.1)},
        ),
        optimizer=fdl.Config(AdamW, lr=1e-4),
        schedule=fdl.Config(WarmupCosine, warmup_steps=20),
        parallel=fdl.Config(Parallel),
        checkpoint=fdl.Config(Checkpoint, every=100),
        logger=fdl.Config(Logger),
        evaluation=fdl.Config(Evaluation, shards=cache_config(f"{cache}/validation"), every=100),
        steps=1000,
        seed=0,
        tokens_per_step=8192,
    )
    fdl.add_tag(config.collate, "row_length", RowLength)
    fdl.add_tag(config.checkpoint, "every", Interval)
    fdl.add_tag(config.evaluation, "every", Interval)
    return config
