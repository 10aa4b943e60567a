"""Does a student learn as much from a dozen drawn tokens a position as from the teacher's top 64?

Command:  python -m launchers.export_teacher --config=sampled_export --out=quickstart/sampled
          torchrun --nproc-per-node 1 -m launchers.train --config=sampled --run_dir=runs/sampled
Expected: about the held-out KL of `quickstart`, from a cache a seventh of the size: draws are unbiased for forward KL.
          KL is measured on the quick start's own held-out cache, because a cache of samples cannot give it.
Seen:     2026-11-25, 3 seeds, as points of the study `storage`: held-out KL 0.882 ± 0.033, NLL 4.362 ± 0.030, against
          0.836 ± 0.006 and 4.334 ± 0.007, from 14 bytes a position in place of 96. Not quite the same KL: n draws cost
          about ½ / n nats. 50 of them (32 bytes) reach 0.846 ± 0.016, and a better NLL (4.319 ± 0.005).
"""

import fiddle as fdl

from data.export.teacher_export import TeacherExport
from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart, quickstart_export


def sampled_export() -> fdl.Config[TeacherExport]:
    """Exports the quick start's corpus and teacher with 12 draws a position in place of the top 64."""
    config = quickstart_export()
    config.selection.top_k = 0
    config.selection.draws = 12
    return config


def sampled() -> fdl.Config[Experiment]:
    """Trains the quick start's student on 12 draws a position, and validates on the same held-out text."""
    config = quickstart()
    config.shards.path = "quickstart/sampled/train"
    config.loss.terms["kd"].tail = "sampled"
    return config
