"""Cost of a point before it runs, in operations and disk space, and the speed of finished points."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from experiments.config.sweep_points import Point
from kd_core.training.monitoring.slow_start import flops_per_token
from launchers.sweeps.sweep_folder import FINISHED, SweepFolder

# Bytes per parameter. A checkpoint holds each trained parameter with its two moments, an export float32 values.
SAVED, EXPORTED = 12, 4


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a point's training, and bytes of the student and the checkpoints that it leaves."""

    flops: float
    export: int
    checkpoints: int


def cost_of(point: Point) -> Cost:
    """Computes the cost of a point's training.

    Raises:
        UsageError: the experiment cannot be built, or its student cannot be read.
    """
    experiment = point.build()
    parameters = list(experiment.student.build_on_meta().parameters())
    count = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    policy = experiment.checkpoint
    # The newest and the best may be the same ones, and a run cannot keep more than it makes.
    checkpoints = min(policy.keep_newest + policy.keep_best, -(-point.steps // policy.every))
    flops = flops_per_token(parameters) * point.tokens
    return Cost(flops, EXPORTED * count, SAVED * trained * checkpoints)


def measured_rate(folder: SweepFolder, costs: Mapping[str, Cost]) -> float | None:
    """Returns the median FLOP/s of finished points, each from its median step. It is None where no point is finished.

    `costs` are keyed by point id.
    """
    rates: list[float] = []
    for point_id, cost in costs.items():
        if folder.status(point_id).state == FINISHED:
            lines = folder.metrics(point_id)
            seconds = [line["speed/step_seconds"] for line in lines if "speed/step_seconds" in line]
            total_seconds = lines[-1]["step"] * median(seconds) if seconds else 0.0
            if total_seconds > 0:
                rates.append(cost.flops / total_seconds)
    return median(rates) if rates else None
