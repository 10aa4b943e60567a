"""How near does the quick start's student come when only low-rank adapters on its 15 layers are trained?

Command:  torchrun --nproc-per-node 1 -m launchers.train --config=lora
Expected: clearly behind `quickstart` (held-out KL 0.833): half of the layers are gone, and what must take over their
          work is of rank 32. A tenth of the memory for optimiser state, and an adapter of a few megabytes.
Seen:     (not run yet)
"""

import fiddle as fdl

from experiments.experiment import Experiment
from experiments.quickstart import quickstart
from kd_core.students.lora import Adapted


def lora() -> fdl.Config[Experiment]:
    """The quick start's student, frozen, with trained adapters of rank 32 on all of its linear layers."""
    config = quickstart()
    config.student = fdl.Config(Adapted, base=config.student, targets=("all",), rank=32, alpha=64.0)
    config.optimizer.lr = 2e-3
    return config
