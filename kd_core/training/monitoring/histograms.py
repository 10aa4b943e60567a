"""How parameters and gradients are spread over sizes, of tensors that are themselves spread over ranks.

Every rank counts its own part in buckets that are the same everywhere, and the counts are added up; a part that several
ranks hold is counted by the first of them. So the numbers are those of the whole tensors, and none is gathered.
"""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kd_core.parallel.world import World

# Halves of powers of two: what is smaller than 2^-40 is one bucket around 0, what is larger than 2^10 the last.
_POSITIVE = [2 ** (half / 2) for half in range(-80, 21)]
LIMITS = [*(-limit for limit in reversed(_POSITIVE)), *_POSITIVE]


def _own(tensor: Tensor) -> Tensor:
    """This rank's part, flat; empty where a rank before it has the same."""
    if not isinstance(tensor, DTensor):
        return tensor.flatten()
    assert not any(placement.is_partial() for placement in tensor.placements)
    repeats = (
        place for place, kind in zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
        if kind.is_replicate()
    )  # fmt: skip
    local = tensor.to_local().flatten()
    return local[:0] if any(repeats) else local


def _counts(values: Tensor) -> Tensor:
    """In float64: of each bucket, then the sum and the sum of squares."""
    places = torch.bucketize(values, torch.tensor(LIMITS, device=values.device, dtype=values.dtype))
    exact = values.double()
    sums = torch.stack([exact.sum(), exact.square().sum()])
    return torch.cat([torch.bincount(places, minlength=len(LIMITS) + 1).double(), sums])


def _ends(values: Tensor) -> Tensor:
    """The largest of −x and of x."""
    values = values.double()
    return torch.stack([(-values).amax(), values.amax()]) if values.numel() else values.new_full((2,), -torch.inf)


def histograms(named: Mapping[str, Tensor], world: World) -> dict[str, dict[str, Any]]:
    """As `add_histogram_raw` of TensorBoard takes them, by name, the same on every rank. All ranks call it."""
    parts = [_own(tensor.detach()) for tensor in named.values()]
    counts, ends = torch.stack([_counts(part) for part in parts]), torch.stack([_ends(part) for part in parts])
    if world.size > 1:
        dist.all_reduce(counts)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    found: dict[str, dict[str, Any]] = {}
    for name, row, (negative, highest) in zip(named, counts.tolist(), ends.tolist(), strict=True):
        *buckets, total, squares = row
        used = [at for at, count in enumerate(buckets) if count]
        first, last = (used[0], used[-1]) if used else (0, 0)
        found[name] = {
            "min": -negative,
            "max": highest,
            "num": sum(buckets),
            "sum": total,
            "sum_squares": squares,
            "bucket_limits": [*LIMITS, float("1.7e308")][first : last + 1],
            "bucket_counts": buckets[first : last + 1],
        }
    return found


@contextlib.contextmanager
def histograms_of_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> Generator[dict[str, dict[str, Any]]]:
    """Filled by the optimiser's step inside of the block: gradients as it takes them, parameters as it finds them.

    A step that is not taken leaves it empty.
    """
    found: dict[str, dict[str, Any]] = {}

    def look(*_: object) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        gradients = {f"gradients/{name}": p.grad for name, p in trained.items() if p.grad is not None}
        found.update(histograms({f"parameters/{name}": p for name, p in trained.items()} | gradients, world))

    handle = optimizer.register_step_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()
