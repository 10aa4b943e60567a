"""Does a student that learns from two caches do better on one of them than from that one alone?

Command:  python -m launchers.train --config='cache_mix(first="quickstart/cache", second="other/cache")'
Expected: with much more text in the second cache, a lower held-out KL on the first after several epochs of it.
Seen:     not run yet.
"""

import fiddle as fdl

from data.stream.source import Mixture
from experiments.base.distill import cache_config
from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart


def cache_mix(
    first: str = "quickstart/cache", second: str = "quickstart/more", share: float = 0.75
) -> fdl.Config[Experiment]:
    """Trains the quick start on two caches: `share` of the scored positions from the first, the rest from the second.

    Each is the --out of an export: its train/ is trained on, and its validation/ is reported by itself. The first one's
    numbers are also those under `val/`.
    """
    config = quickstart()
    folders = {"first": first, "second": second}
    config.shards = fdl.Config(
        Mixture,
        caches={name: cache_config(f"{folder}/train") for name, folder in folders.items()},
        weights={"first": share, "second": round(1 - share, 12)},
    )
    config.evaluation.shards = {name: cache_config(f"{folder}/validation") for name, folder in folders.items()}
    return config
