"""Table of a sweep before it runs, and the checks of its points."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from data.cache.manifest import list_caches
from experiments.base.checks import local_caches
from experiments.config.sweep_points import Point, point_label, short_names, swept_paths, table_text
from kd_core.errors import UsageError
from launchers.reports import text_tables
from launchers.sweeps.point_cost import Cost, cost_of, measured_rate
from launchers.sweeps.sweep_folder import SweepFolder

NAMED = 8  # points of one missing cache


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
        values = [table_text(point.values[path]) if path in point.values else "" for path in paths]
        rows.append([point.id, *values, f"{point.tokens:,}", _number(flops, ".2e"), _number(hours, ".2f"),
                     folder.status(point.id).state])  # fmt: skip
    table = text_tables.format_aligned(
        ["id", *(names[path] for path in paths), "tokens", "FLOP", "hours", "state"], rows
    )
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
        "deletes where a point is finished); a running point has one checkpoint more"
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
            messages.append(f"{point.id} {point_label(point, paths)}: {error}")
    return messages


def refuse_missing_caches(points: Sequence[Point]) -> None:
    """Checks that the caches of all points on this machine are complete. A point that cannot be built fails later.

    Raises:
        UsageError: some are missing or incomplete; names them and their points.
    """
    readers: dict[tuple[str, Path], list[str]] = {}
    for point in points:
        try:
            caches = local_caches(point.build())
        except UsageError:
            continue
        for path, folder in caches.items():
            if not (folder / "manifest.json").is_file():
                readers.setdefault((path, folder), []).append(point.id)
    if readers:
        missing = "\n  ".join(
            f"{path} {folder}{f' (there are some in it: {inside})' if (inside := list_caches(folder)) else ''}, "
            f"of {_some(ids)}"
            for (path, folder), ids in readers.items()
        )
        raise UsageError(
            f"no complete cache (no manifest.json) at\n  {missing}\nNo point was started. Make each with "
            "launchers.export_teacher, or name caches that exist. --backend=check looks at all else."
        )


def _some(ids: Sequence[str]) -> str:
    """Names points, the first few of many."""
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"{len(ids)} point{'s' * (len(ids) > 1)}: {', '.join(ids[:NAMED])}{more}"
