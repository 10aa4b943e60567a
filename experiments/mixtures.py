"""Does a student that learns from two caches do better on one of them than from that one alone?

Command:  torchrun --nproc-per-node 1 -m launchers.train --config='cache_mix(second="other/cache/train")'
Expected: with much more text in the second cache, a lower held-out KL on the first after several epochs of it.
Seen:     not run yet.
"""

import fiddle as fdl

from data.stream.source import Mixture
from experiments.base.distill import cache_config
from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart


def cache_mix(
    first: str = "quickstart/cache/train", second: str = "quickstart/more/train", share: float = 0.75
) -> fdl.Config[Experiment]:
    """Trains the quick start on two caches: `share` of the scored positions from the first, the rest from the second.

    Each is a folder with a manifest: OUT/train of an export to OUT, or an imported cache.
    """
    config = quickstart()
    caches = {name: cache_config(path) for name, path in (("first", first), ("second", second))}
    rest = round(1 - share, 12)  # 0.3 for a share of 0.7, where 1 - 0.7 is 0.30000000000000004
    config.shards = fdl.Config(Mixture, caches=caches, weights={"first": share, "second": rest})
    return config
