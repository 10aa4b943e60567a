"""What a point costs before it runs, and how fast the finished ones were."""

from collections.abc import Sequence
from statistics import median

from launchers.sweeping.folder import FINISHED, SweepFolder
from launchers.sweeping.points import Point

# Per parameter and token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1): the forward pass and the gradient of its
# inputs, and the gradient of a parameter that is trained.
THROUGH, TRAINED = 4, 2


def flops(point: Point) -> float:
    """Floating-point operations of the student's training.

    Raises:
        UsageError: the experiment cannot be built, or its student cannot be read.
    """
    parameters = list(point.build().student.decoder().parameters())
    each = sum((THROUGH + TRAINED * parameter.requires_grad) * parameter.numel() for parameter in parameters)
    return float(each) * point.tokens


def measured_rate(folder: SweepFolder, points: Sequence[Point]) -> float | None:
    """Median FLOP/s of the finished points' steps, of a point at a time; None where none is finished."""
    rates: list[float] = []
    for point in points:
        if folder.status(point).state == FINISHED:
            speeds = [
                line["speed/tokens_per_second"]
                for line in folder.metrics(point.id)
                if "speed/tokens_per_second" in line
            ]
            rates.append(flops(point) / point.tokens * median(speeds))
    return median(rates) if rates else None
