"""How near does the quick start's student come to its teacher when only low-rank adapters on its 15 layers train?

Command:  torchrun --nproc-per-node 1 -m launchers.train --config=lora
Expected: clearly behind `quickstart` (held-out KL 0.833): half of the layers are gone, and updates of rank 32 must take
          over their work. A sixteenth of the optimiser's state, and an adapter of 20 MB.
Seen:     2026-11-24, the first 6 of 20 steps of a short run (not finished, no held-out figure yet): training loss 2.603
          → 1.623, its KL 2.209 → 1.319, 4.9M of 86.3M parameters trained.
"""

import fiddle as fdl

from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart
from kd_core.students.starts.lora_start import LoraStart


def lora() -> fdl.Config[Experiment]:
    """Freezes the quick start's student and trains adapters of rank 32 on all of its linear layers."""
    config = quickstart()
    config.student = fdl.Config(LoraStart, base=config.student, targets=("all",), rank=32, alpha=64.0)
    config.optimizer.lr = 2e-3
    return config
