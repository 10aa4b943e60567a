"""Table of a sweep before it runs, and the check of every point."""

from collections.abc import Sequence

from tqdm import tqdm

from kd_core.errors import UsageError
from launchers.reports import text_tables
from launchers.sweeps.point_cost import Cost, cost_of, measured_rate
from launchers.sweeps.sweep_folder import SweepFolder
from experiments.config.sweep_points import Point, label, short_names, shown, swept_paths


def plan(folder: SweepFolder, points: Sequence[Point], tokens_per_second: float | None) -> str:
    """Returns the table of points with tokens, FLOP, hours and state, and a summary with the disk space.

    Hours are given where `tokens_per_second` is set, or where finished points give a rate.
    """
    paths = swept_paths(points)
    names = short_names(paths)
    costs_or_errors = {point.id: _cost(point) for point in points}
    costs = {key: cost for key, cost in costs_or_errors.items() if isinstance(cost, Cost)}
    error = next((cost for cost in costs_or_errors.values() if isinstance(cost, str)), "")
    rate = None if tokens_per_second else measured_rate(folder, costs)
    rows: list[list[str]] = []
    total_tokens, total_hours = 0, 0.0
    for point in points:
        flops = costs[point.id].flops if point.id in costs else None
        hours = _hours(point, flops, tokens_per_second, rate)
        total_tokens += point.tokens
        total_hours += hours or 0.0
        values = [shown(point.values[path]) if path in point.values else "" for path in paths]
        rows.append([point.id, *values, f"{point.tokens:,}", _number(flops, ".2e"), _number(hours, ".2f"),
                     folder.status(point.id).state])  # fmt: skip
    table = text_tables.aligned(["id", *(names[path] for path in paths), "tokens", "FLOP", "hours", "state"], rows)
    source = "given" if tokens_per_second else "as the finished points ran" if rate else ""
    hours = f", {total_hours:.2f} hours one after another ({source})" if source else "; for hours: --tokens_per_second"
    total = f"{table}\n{len(points)} points, {total_tokens:,} tokens"
    if error:
        return f"{total}, FLOP unknown: {error}"
    return f"{total}, {sum(cost.flops for cost in costs.values()):.2e} FLOP{hours}\n{_disk(list(costs.values()))}"


def _disk(costs: Sequence[Cost]) -> str:
    """Returns the disk space that all points leave, with and without checkpoints."""
    exports, checkpoints = sum(cost.export for cost in costs), sum(cost.checkpoints for cost in costs)
    total, students, saved = (tqdm.format_sizeof(size, "B") for size in (exports + checkpoints, exports, checkpoints))
    return (
        f"disk, in the end: up to {total} ({students} of students, {saved} of checkpoints, which --nokeep_checkpoints "
        "deletes where a point is finished); a point that runs has one more"
    )


def _cost(point: Point) -> Cost | str:
    """Returns a point's cost, or the reason why it is unknown."""
    try:
        return cost_of(point)
    except (UsageError, OSError) as error:
        return str(error)


def _hours(point: Point, flops: float | None, tokens_per_second: float | None, rate: float | None) -> float | None:
    """Returns a point's hours, or None where no speed is known."""
    if tokens_per_second:
        return point.tokens / tokens_per_second / 3600
    return flops / rate / 3600 if flops is not None and rate else None


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def check(points: Sequence[Point], ranks: int = 1) -> list[str]:
    """Builds every point, and checks it against its caches and the number of ranks.

    Returns one message per point that is wrong.
    """
    paths, messages = swept_paths(points), list[str]()
    for point in points:
        try:
            point.build().check(ranks)
        except (UsageError, OSError) as error:
            messages.append(f"{point.id} {label(point, paths)}: {error}")
    return messages
