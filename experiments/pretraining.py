"""How far does a small student come that begins from random weights and learns from the teacher alone?

Command:  torchrun --nproc-per-node 1 -m launchers.train --config=pretraining
Expected: a KL far above the 0.83 of the quick start, which begins from the teacher's own layers: 61k tokens teach a
          random student little more than which tokens are frequent. The recipe is for caches a thousand times as large.
Seen:     not run yet.
"""

import fiddle as fdl

from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart
from kd_core.students.starts.start import Random


def pretraining() -> fdl.Config[Experiment]:
    """Trains a random student of 12M parameters: forward KL alone on packed text, four epochs, cosine to a tenth."""
    config = quickstart()
    config.student = fdl.Config(
        Random, folder="quickstart/teacher",
        hidden_size=192, intermediate_size=512, num_layers=6, num_heads=6, num_kv_heads=3,
    )  # fmt: skip
    config.loss.terms["kd"].weight = 1.0
    config.loss.terms["sft"].weight = 0.0
    config.optimizer.lr = 2e-3
    config.optimizer.weight_decay = 0.1
    config.schedule.warmup_steps = 20
    config.schedule.min_ratio = 0.1
    config.checkpoint.every = config.evaluation.every = 60
    config.steps = 240
    return config
