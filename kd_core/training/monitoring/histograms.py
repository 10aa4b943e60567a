"""Histograms of parameters and gradients, computed on sharded tensors without gathering them.

Every rank counts its shard in buckets that are the same on all ranks, and the counts are added up. A shard that
several ranks hold is counted by the first of them. So the numbers are those of the whole tensors.
"""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_core.parallel.world import World
from kd_core.sharded_values import distinct_local
from kd_core.training.move import clip_now

# Upper limits of the buckets: ±2^(h/2) for h = -80 … 20. Values below 2^-40 in size share one bucket around 0, those
# above 2^10 fall into the last one.
_POSITIVE = [2 ** (half / 2) for half in range(-80, 21)]
LIMITS = [*(-limit for limit in reversed(_POSITIVE)), *_POSITIVE]


def _counts(values: Tensor) -> Tensor:
    """Returns the count of each bucket, then Σ x and Σ x², in float64.  [buckets + 2]"""
    # Bucket i holds limit[i−1] < x ≤ limit[i], the one behind the last limit all that is larger.  [n]
    bucket_ids = torch.bucketize(values, torch.tensor(LIMITS, device=values.device, dtype=values.dtype))
    # Sums of bfloat16 or float32 lose digits over millions of values.
    exact = values.double()
    sums = torch.stack([exact.sum(), exact.square().sum()])
    # One vector for counts and sums, so that a single all-reduce adds both.
    return torch.cat([torch.bincount(bucket_ids, minlength=len(LIMITS) + 1).double(), sums])


def _ends(values: Tensor) -> Tensor:
    """Returns max(−x) and max(x), −∞ for no values.  [2]

    The minimum is −max(−x), so one all-reduce with MAX finds both ends.
    """
    values = values.double()
    return torch.stack([(-values).amax(), values.amax()]) if values.numel() else values.new_full((2,), -torch.inf)


def histograms(named: Mapping[str, Tensor], world: World) -> dict[str, dict[str, Any]]:
    """Returns a histogram of each tensor by name, as the arguments of TensorBoard's `add_histogram_raw`.

    All ranks call it together, and get the same result.
    """
    # Count this rank's shards.  [tensors, buckets + 2], [tensors, 2]
    shards = [distinct_local(tensor.detach()) for tensor in named.values()]
    counts, ends = torch.stack([_counts(shard) for shard in shards]), torch.stack([_ends(shard) for shard in shards])
    # Combine ranks: every value is counted by exactly one of them.
    if world.size > 1:
        dist.all_reduce(counts)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    raw_histograms: dict[str, dict[str, Any]] = {}
    for name, row, (negative_min, highest) in zip(named, counts.tolist(), ends.tolist(), strict=True):
        *buckets, total, squares = row
        # Leave out the empty buckets at both ends.
        used = [index for index, count in enumerate(buckets) if count]
        first, last = (used[0], used[-1]) if used else (0, 0)
        raw_histograms[name] = {
            "min": -negative_min,
            "max": highest,
            "num": sum(buckets),
            "sum": total,
            "sum_squares": squares,
            "bucket_limits": [*LIMITS, float("1.7e308")][first : last + 1],
            "bucket_counts": buckets[first : last + 1],
        }
    return raw_histograms


@contextlib.contextmanager
def histograms_of_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> Generator[dict[str, dict[str, Any]]]:
    """Yields a dictionary that the optimiser's step inside of the block fills with histograms.

    They show gradients after clipping and parameters before the update. The dictionary stays empty if the optimiser
    does not step.
    """
    step_histograms: dict[str, dict[str, Any]] = {}

    def record(*_: object) -> None:
        clip_now(optimizer)
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        gradients = {f"gradients/{name}": p.grad for name, p in trained.items() if p.grad is not None}
        step_histograms.update(histograms({f"parameters/{name}": p for name, p in trained.items()} | gradients, world))

    handle = optimizer.register_step_pre_hook(record)
    try:
        yield step_histograms
    finally:
        handle.remove()
