"""Labels against the teacher's distributions, on the same tokens, read once and several times."""

import fiddle as fdl

from experiments.experiment import Experiment
from experiments.quickstart import quickstart
from experiments.sweep import Sweep, grid, seeds, zipped

EPOCH = 60  # steps: 121 rows of 512 positions, two of them a step


def by_the_epoch() -> fdl.Config[Experiment]:
    """The quick start, asked for numbers alone, once an epoch."""
    config = quickstart()
    config.checkpoint.every = config.evaluation.every = EPOCH
    config.evaluation.prompts = ()
    return config


def objectives() -> Sweep:
    """What does the teacher's distribution add to the labels, on the same tokens, once and three times over them?

    Expected: Once over the cache, everything with a teacher's term ends nearer to the teacher than cross-entropy alone,
              by 0.2 nats of KL and more, with about the same NLL; a tenth of cross-entropy costs no KL and gains NLL
              over distillation alone. Three times over it, cross-entropy alone learns its labels by heart and its
              held-out NLL rises or stands still, while distillation, whose targets are distributions, goes on gaining.
    Seen:     not run yet.
    """
    weights = zipped({"loss.terms.kd.weight": [0.0, 0.5, 0.9, 1.0], "loss.terms.sft.weight": [1.0, 0.5, 0.1, 0.0]})
    return Sweep(by_the_epoch) * seeds(3) * grid("steps", [EPOCH, 3 * EPOCH]) * weights


def rates() -> Sweep:
    """Is what `objectives` sees due to the learning rate? Cross-entropy and the 0.9 mixture at half and at twice it.

    Expected: each has its best rate at 4e-4 or half of it, and cross-entropy at its best is still behind in KL.
    Seen:     not run yet.
    """
    weights = zipped({"loss.terms.kd.weight": [0.0, 0.9], "loss.terms.sft.weight": [1.0, 0.1]})
    return Sweep(by_the_epoch) * seeds(3) * grid("optimizer.lr", [2e-4, 8e-4]) * weights
