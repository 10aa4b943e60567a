"""Does a student learn as much from a dozen drawn tokens a position as from the teacher's top 64?

Command:  python -m launchers.export_teacher --config=sampled_export --out=quickstart/sampled
          torchrun --nproc-per-node 1 -m launchers.train --config=sampled --run_dir=runs/sampled
Expected: about the held-out KL of `quickstart`, from a cache a seventh of the size: draws are unbiased for forward KL.
          KL is measured on the quick start's own held-out cache, for samples do not give it.
Seen:     (not run yet)
"""

import fiddle as fdl

from data.export.plan import TeacherExport
from experiments.experiment import Experiment
from experiments.quickstart import quickstart, quickstart_export


def sampled_export() -> fdl.Config[TeacherExport]:
    """The quick start's corpus and teacher; 12 draws a position in place of the top 64."""
    config = quickstart_export()
    config.selection.top_k = 0
    config.selection.draws = 12
    return config


def sampled() -> fdl.Config[Experiment]:
    """The quick start's student on 12 draws a position, held against the same held-out text."""
    config = quickstart()
    config.shards.path = "quickstart/sampled/train"
    config.loss.terms["kd"].tail = "sampled"
    return config
