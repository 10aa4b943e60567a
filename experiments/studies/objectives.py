"""A study of labels against the teacher's distributions, on the same tokens, read once and several times."""

import fiddle as fdl

from experiments.base.experiment import Experiment
from experiments.base.sweep_definition import Sweep, grid, seeds, zipped
from experiments.half_depth import quickstart

EPOCH = 60  # steps: 121 rows of 512 positions, two of them a step


def by_the_epoch() -> fdl.Config[Experiment]:
    """Trains the quick start without prompts, and validates and saves once an epoch."""
    config = quickstart()
    config.checkpoint.every = config.evaluation.every = EPOCH
    config.evaluation.prompts = ()
    return config


def objectives() -> Sweep:
    """What does the teacher's distribution add to the labels, on the same tokens, read once and three times?

    Expected: Read once, everything with a teacher's term ends nearer to the teacher than cross-entropy alone, by at
              least 0.2 nats of KL, with about the same NLL. A tenth of cross-entropy costs no KL and gains NLL over
              distillation alone. Read three times, cross-entropy alone memorises its labels, and its held-out NLL
              rises or stands still. Distillation, whose targets are distributions, keeps gaining.
    Seen:     2026-11-24, 8,165 held-out positions, 3 seeds, 72 minutes on two cores (`results/objectives/`, teacher NLL
              3.505). Read once: the nearer to distillation alone, the lower the KL (1.041 ± .010, .896 ± .007,
              .836 ± .006, .837 ± .016). The gain reaches 0.2 nats from 0.9 on, and is 0.145 for an even mixture. NLL is
              best for the even mixture (4.286 ± .018 against 4.336 ± .026 for labels alone and 4.334 ± .007 for 0.9),
              so "about the same NLL" expected too little. A tenth of cross-entropy costs no KL, and gains .044 of NLL
              over none.
              Read three times: labels alone are memorised, NLL 4.621 ± .038, KL 1.371 ± .033, agreement .407, ECE .127.
              All are worse than after reading once. With 0.9, NLL falls to 4.148 ± .009 and KL to .691 ± .007,
              agreement .526 ± .002. The even mixture gains least (NLL 4.179, KL .837). By validation after each epoch
              (from the runs' own logs, because sweeps write `curves.csv` only since then), labels alone are best after
              the first: NLL 4.285, 4.347, 4.621. Stopping early would not have brought them past the mixtures.
    """
    weights = zipped({"loss.terms.kd.weight": [0.0, 0.5, 0.9, 1.0], "loss.terms.sft.weight": [1.0, 0.5, 0.1, 0.0]})
    return Sweep(by_the_epoch) * seeds(3) * grid("steps", [EPOCH, 3 * EPOCH]) * weights


def rates() -> Sweep:
    """Is what `objectives` sees due to the learning rate? Cross-entropy and the 0.9 mixture at half and twice the rate.

    Expected: each is best at 4e-4 or at half of it, and cross-entropy at its best rate is still behind in KL.
    Seen:     not run yet.
    """
    weights = zipped({"loss.terms.kd.weight": [0.0, 0.9], "loss.terms.sft.weight": [1.0, 0.1]})
    return Sweep(by_the_epoch) * seeds(3) * grid("optimizer.lr", [2e-4, 8e-4]) * weights
