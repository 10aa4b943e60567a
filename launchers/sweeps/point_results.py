"""Points of a sweep as its tables show them: their metrics, means over seeds, and which metrics are comparable."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.config.sweep_points import Point
from kd_core.errors import UsageError, escape_unprintable
from kd_core.losses.metric_table import BRIEF
from kd_core.training.run_folder import read_run_settings
from launchers.reports.runs import deciding_settings, incomparable
from launchers.sweeps.seed_statistics import Mean, mean_of
from launchers.sweeps.sweep_folder import FINISHED, SweepFolder

Line = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A point with its state.

    A finished one has its last metrics, all validations, what precision `auto` chose, and its deciding settings.
    """

    point: Point
    state: str
    final: Line
    curve: Sequence[Line] = ()
    precision: str | None = None
    deciding: dict[str, str] = field(default_factory=dict)


def read_row(folder: SweepFolder, point: Point) -> Row:
    """Reads a point's row from its folder."""
    state = folder.status(point.id).state
    if state != FINISHED:
        return Row(point, state, {})
    lines = folder.metrics(point.id)
    curve = [{name: line[name] for name in line if name == "step" or name.startswith("val/")} for line in lines]
    final = {escape_unprintable(name): value for name, value in (curve or [{}])[-1].items() if name != "step"}
    run = folder.run_folder(point.id)
    precision = run.precision() if point.config.parallel.precision == "auto" else None
    deciding = deciding_settings(read_run_settings(run), run.last_facts())
    return Row(point, state, final, [line for line in curve if len(line) > 1], precision, deciding)


def metric_names(points: Sequence[Point], rows: Sequence[Row]) -> list[str]:
    """Returns the names of the validation metrics, known before any point runs. Those that logs show come first.

    Metrics that were measured stay, even where a cache has gone and its metrics can no longer be predicted.
    """
    names = {name for row in rows for name in row.final}
    for point in points:
        try:
            names |= point.validation_metrics
        except UsageError:
            continue  # a point that cannot be built has no metrics, and `check` reports why
    shown_first = [f"val/{name}" for name in BRIEF]
    return [name for name in shown_first if name in names] + sorted(names - set(shown_first))


@dataclass(frozen=True)
class Group:
    """Finished points that differ in their seed alone."""

    point: Point
    means: dict[str, Mean]
    n: int


def group_by_seed(rows: Sequence[Row], names: Sequence[str]) -> list[Group]:
    """Groups finished points that differ only in their seed, in the order of their first points."""
    rows_by_hash: dict[str, list[Row]] = {}
    for row in rows:
        if row.final:
            rows_by_hash.setdefault(row.point.hash_without_seed, []).append(row)
    return [
        Group(
            members[0].point,
            {
                name: mean_of([row.final[name] for row in members])
                for name in names
                if all(name in row.final for row in members)
            },
            len(members),
        )
        for members in rows_by_hash.values()
    ]


def other_quantities(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the metrics that are different quantities at different points, with the settings that make them so."""
    paths = {name: incomparable(name, [row.deciding for row in rows if name in row.final]) for name in names}
    return {name: settings for name, settings in paths.items() if settings}
