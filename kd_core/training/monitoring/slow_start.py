"""A warning if the first steps take far longer than their matmuls should on this machine, with the likely cause."""

import logging
import os
import time
from collections.abc import Iterable

import torch
from torch import nn

from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.precision import bfloat16_support, dtype_of

log = logging.getLogger("kd")
# Operations per parameter and token: 2 for the forward pass, 2 for the gradient of its inputs, and 2 for the gradient
# of a trained parameter (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
FORWARD_AND_INPUT_FLOPS, PARAMETER_FLOPS = 4, 2
# A step is slow if it takes `SLOW_FACTOR` times as long as its matmuls in float32. That leaves room for attention, the
# optimiser and small tensors. A step below `SHORT` seconds is bound by kernel launches, and never called slow.
SLOW_FACTOR, SHORT = 4.0, 1.0
WATCHED_STEPS = 2
MEASURED_SIZE = 1024


def flops_per_token(parameters: Iterable[nn.Parameter]) -> float:
    """Returns the floating-point operations of one token's forward and backward pass through the matmuls."""
    return float(sum((FORWARD_AND_INPUT_FLOPS + PARAMETER_FLOPS * p.requires_grad) * p.numel() for p in parameters))


def float32_rate(device: torch.device) -> float:
    """Returns the FLOP/s of a float32 matmul on a device: the best of a few, in a fraction of a second."""
    left, right = torch.randn(2, MEASURED_SIZE, MEASURED_SIZE, device=device)
    seconds: list[float] = []
    for _ in range(4):
        started = time.perf_counter()
        float((left @ right)[0, 0])  # reading a number waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * MEASURED_SIZE**3 / min(seconds)


class SlowStart:
    """A comparison of the first two steps of a start with their matmuls, and one warning on the first rank.

    The faster of the two counts: the first step also pays for one-time work such as compilation.

    Args:
        model: the student. Its parameters count as whole tensors.
        parallel: the layout. Its precision is a likely cause.
        world: the ranks, which divide the positions and the tensor-parallel matmuls of a step.
        steps: the optimiser steps that are left.
    """

    def __init__(self, model: nn.Module, parallel: Parallel, world: World, steps: int) -> None:
        self.flops = flops_per_token(model.parameters()) / world.size
        self.parallel, self.device, self.steps = parallel, world.device, steps
        self.watched = min(WATCHED_STEPS, steps) if world.is_first else 0
        self.step_times: list[tuple[float, float]] = []

    def add(self, positions: int, seconds: float, waited: float) -> None:
        """Adds a step of `positions` over all ranks. After the last watched step, warns if they are slow.

        The step took `seconds` after it `waited` for its data.
        """
        if len(self.step_times) >= self.watched:
            return
        self.step_times.append((seconds, waited))
        seconds, waited = min(self.step_times, key=sum)
        if len(self.step_times) < self.watched or seconds + waited < SHORT:
            return
        rate = float32_rate(self.device)
        expected = positions * self.flops / rate
        if seconds + waited < SLOW_FACTOR * expected:
            return
        left = (seconds + waited) * (self.steps - self.watched)
        duration = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
        log.warning(
            "slow: a step takes %.1f s, %.0f times the %.2g s that its matmuls would in float32 at this machine's "
            "%.0f GFLOP/s; the steps that are left take %s. %s", seconds + waited,
            (seconds + waited) / expected, expected, rate / 1e9, duration, self._cause(seconds, waited),
        )  # fmt: skip

    def _cause(self, seconds: float, waited: float) -> str:
        support, load = bfloat16_support(self.device), os.getloadavg()[0]
        if waited > seconds:
            return f"{waited:.1f} s of it are spent waiting for data. Move the cache nearer, or onto a faster disk."
        if dtype_of(self.parallel.precision, self.device) == torch.bfloat16 and not support.is_fast:
            return (
                f"It uses bfloat16, and {support.reason}. Start again in another --run_dir with "
                "--config=parallel.precision=float32."
            )
        if self.device.type == "cpu" and load > 1.5 * (os.cpu_count() or 1):
            return (
                f"Other processes keep the cores busy (load {load:.1f} on {os.cpu_count()} cores). Stop them, or wait."
            )
        return "--profile=3 in another --run_dir shows where the time is spent."
