"""Recipes for machines that this repository was never run on: an 8B teacher into a 1B student of its family.

Command:  torchrun --nproc-per-node 8 -m launchers.train --config=gpus8
          srun torchrun --nnodes 64 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 \\
              -m launchers.train --config=nodes64
Expected: a starting point to tune, not a result: step size, layout and precision fit the machines.
Seen:     never run. `--dry_run` checks the parts and names the folders that have to be made.
"""

import fiddle as fdl

from experiments.base.distill import distill
from experiments.base.experiment import Experiment


def gpus8() -> fdl.Config[Experiment]:
    """Trains a 1B student on an 8B teacher's cache with 8 GPUs, never run: 10B tokens, 0.5M a step, rows of 4,096."""
    config = distill(model="models/student-1b", cache="caches/teacher-8b")
    config.collate.row_length = 4096
    config.tokens_per_step = 4096 * 128
    config.optimizer.lr = 2e-4
    config.optimizer.weight_decay = 0.1
    config.schedule.warmup_steps = 500
    config.schedule.min_ratio = 0.1
    config.parallel.micro_batch_rows = 4
    config.parallel.recompute = "every:2"
    config.parallel.compile = True
    config.checkpoint.every = config.evaluation.every = 500
    config.checkpoint.keep_newest = 2
    config.logger.every = 10
    config.steps = 20_000
    return config


def nodes64() -> fdl.Config[Experiment]:
    """Trains as `gpus8` on 64 nodes of 8 GPUs, never run: 100B tokens, 4M a step, with a sharded copy on each node."""
    config = gpus8()
    config.tokens_per_step = 4096 * 1024
    config.optimizer.lr = 4e-4
    config.schedule.warmup_steps = 1000
    config.parallel.micro_batch_rows = 2
    config.parallel.recompute = "none"
    config.parallel.shard = "full"
    config.parallel.replicas = 64
    config.steps = 24_000
    return config
