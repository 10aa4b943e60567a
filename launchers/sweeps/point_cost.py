"""What a point costs before it runs, in operations and on the disk, and how fast the finished ones were."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from kd_core.training.monitoring.slow_start import flops_per_token
from launchers.sweeps.sweep_folder import FINISHED, SweepFolder
from experiments.config.sweep_points import Point

# Of a checkpoint: a trained parameter and its two moments. Of an exported one: float32.
SAVED, EXPORTED = 12, 4


@dataclass(frozen=True)
class Cost:
    """Of a point: floating-point operations of its training, and bytes of the student and checkpoints it leaves."""

    flops: float
    export: int
    checkpoints: int


def cost_of(point: Point) -> Cost:
    """What the student's training costs.

    Raises:
        UsageError: the experiment cannot be built, or its student cannot be read.
    """
    experiment = point.build()
    parameters = list(experiment.student.decoder().parameters())
    count = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    policy = experiment.checkpoint
    # The best may be among the newest, and there are no more than the run makes.
    kept = min(policy.keep_newest + policy.keep_best, -(-point.steps // policy.every))
    flops = flops_per_token(parameters) * point.tokens
    return Cost(flops, EXPORTED * count, SAVED * trained * kept)


def measured_rate(folder: SweepFolder, costs: Mapping[str, Cost]) -> float | None:
    """Median FLOP/s of the steps of finished points, of a point at a time; None where none is. `costs` are by id."""
    rates: list[float] = []
    for point_id, cost in costs.items():
        if folder.status(point_id).state == FINISHED:
            lines = folder.metrics(point_id)
            seconds = [line["speed/step_seconds"] for line in lines if "speed/step_seconds" in line]
            spent = lines[-1]["step"] * median(seconds) if seconds else 0.0
            if spent > 0:
                rates.append(cost.flops / spent)
    return median(rates) if rates else None
