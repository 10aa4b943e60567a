"""Tables that compare the points of a sweep.

    results.csv    a row per point              summary.csv    means over seeds
    curves.csv     every validation             results.md, tensorboard/

They are made from the points' own folders while these finish. Each finished point is read once, and writing the tables
takes at most a tenth of the time. The cost thus grows with the number of points, not with its square. The tables do
not depend on when or how often a point was started.
"""

import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kd_core.errors import UsageError, escape_unprintable
from kd_core.files import new_folder, read_json, write_json, write_text
from kd_core.losses.metric_table import BRIEF
from kd_core.training.monitoring.tensorboard import HParam, write_columns, write_session
from launchers.reports import text_tables
from launchers.sweeps.sweep_folder import FINISHED, SweepFolder
from experiments.config.sweep_points import Point, point_label, short_names, table_text, swept_paths
from launchers.sweeps.seed_statistics import CONFIDENCE, Mean, mean_of

SEED = "seed"
PAUSES = 9  # the tables are next written after this many times the seconds that writing them took
Line = dict[str, float]
log = logging.getLogger("kd")


@dataclass(frozen=True)
class Row:
    """A point with its state. A finished one has its last metrics, all validations, and what precision `auto` chose."""

    point: Point
    state: str
    final: Line
    curve: Sequence[Line] = ()
    precision: str | None = None


def _row(folder: SweepFolder, point: Point) -> Row:
    state = folder.status(point.id).state
    if state != FINISHED:
        return Row(point, state, {})
    lines = folder.metrics(point.id)
    curve = [{name: line[name] for name in line if name == "step" or name.startswith("val/")} for line in lines]
    final = {escape_unprintable(name): value for name, value in (curve or [{}])[-1].items() if name != "step"}
    precision = folder.run_folder(point.id).precision() if point.config.parallel.precision == "auto" else None
    return Row(point, state, final, [line for line in curve if len(line) > 1], precision)


@dataclass
class Results:
    """Tables of a sweep while its points finish. `gone` earlier points are no longer in the sweep."""

    folder: SweepFolder
    points: Sequence[Point]
    gone: int = 0
    keep_checkpoints: bool = True
    finished: dict[str, Row] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)  # ids of the points that TensorBoard has
    due: float = 0.0

    def rows(self) -> list[Row]:
        """Returns the rows of all points in the sweep's order."""
        return [self.finished.get(point.id) or self._read(point) for point in self.points]

    def _read(self, point: Point) -> Row:
        row = _row(self.folder, point)
        if row.state == FINISHED:
            self.finished[point.id] = row
            if not self.keep_checkpoints:
                self.folder.drop_checkpoints([point.id])
        return row

    def write_if_due(self) -> None:
        """Writes the tables, unless they were written so recently that this would take too much of the time."""
        if time.monotonic() >= self.due:
            self.write()

    def write(self) -> str:
        """Writes all tables, and returns the Markdown."""
        started = time.monotonic()
        rows, paths = self.rows(), swept_paths(self.points)
        names = metric_names(self.points, rows)
        groups, folder = group_by_seed(rows, names), self.folder.path
        write_text(folder / "results.csv", _points_csv(rows, paths, names))
        write_text(folder / "summary.csv", _groups_csv(groups, paths, names))
        write_text(folder / "curves.csv", _curves_csv(rows, paths, names))
        text = _markdown(rows, groups, paths, names, self.gone)
        write_text(folder / "results.md", text)
        _write_tensorboard(folder / "tensorboard", rows, paths, names, self.shown)
        self.due = time.monotonic() + PAUSES * (time.monotonic() - started)
        return text


def write_results(folder: SweepFolder, points: Sequence[Point], gone: int = 0, *, keep_checkpoints: bool = True) -> str:
    """Writes the tables once and returns the Markdown. Warns of differences that make points incomparable."""
    results = Results(folder, points, gone, keep_checkpoints)
    text = results.write()
    _warn_of_precisions(list(results.finished.values()))
    return text


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


def _warn_of_precisions(rows: Sequence[Row]) -> None:
    """Warns where points that leave the precision to their machine were trained in different ones."""
    counts = Counter(row.precision for row in rows if row.point.config.parallel.precision == "auto")
    if len(counts) > 1:
        log.warning(
            "points were trained in several precisions (%s), as their machines do well: compare them with care, or "
            "train again with --config=parallel.precision=float32",
            ", ".join(f"{count} in {precision}" for precision, count in counts.items()),
        )


def _values(point: Point, paths: Sequence[str]) -> list[str]:
    return [table_text(point.values[path]) if path in point.values else "" for path in paths]


def _numbers(metrics: dict[str, float], names: Sequence[str]) -> list[str]:
    """Returns each metric with all digits, or an empty text where it is missing."""
    return [repr(metrics[name]) if name in metrics else "" for name in names]


def _points_csv(rows: Sequence[Row], paths: Sequence[str], names: Sequence[str]) -> str:
    lines = [
        [
            row.point.id,
            *_values(row.point, paths),
            row.state,
            *_numbers(row.final, names),
        ]
        for row in rows
    ]
    return text_tables.format_csv(["id", *paths, "state", *names], lines)


def _curves_csv(rows: Sequence[Row], paths: Sequence[str], names: Sequence[str]) -> str:
    """Formats a row per validation of each finished point."""
    lines = [
        [row.point.id, *_values(row.point, paths), f"{validation['step']:.0f}", *_numbers(validation, names)]
        for row in rows
        if row.final
        for validation in row.curve
    ]
    return text_tables.format_csv(["id", *paths, "step", *names], lines)


def _groups_csv(groups: Sequence[Group], paths: Sequence[str], names: Sequence[str]) -> str:
    axes = [path for path in paths if path != SEED]
    header = [*axes, "n", *(column for name in names for column in (name, f"{name} ±"))]

    def cells(mean: Mean | None) -> tuple[str, str]:
        if mean is None:
            return "", ""
        return repr(mean.mean), "" if mean.half is None else repr(mean.half)

    lines = [
        [*_values(group.point, axes), str(group.n), *(cell for name in names for cell in cells(group.means.get(name)))]
        for group in groups
    ]
    return text_tables.format_csv(header, lines)


def _with_interval(mean: Mean | None) -> str:
    if mean is None:
        return ""
    return f"{mean.mean:.4f}" + ("" if mean.half is None else f" ± {mean.half:.4f}")


def _markdown(
    rows: Sequence[Row], groups: Sequence[Group], paths: Sequence[str], names: Sequence[str], gone: int
) -> str:
    main = [name for name in names if name.removeprefix("val/") in BRIEF]
    axes = [path for path in paths if path != SEED]
    short = short_names(paths)
    by_group = [
        [*_values(group.point, axes), str(group.n), *(_with_interval(group.means.get(name)) for name in main)]
        for group in groups
    ]
    by_point = [
        [row.point.id, *_values(row.point, paths), row.state]
        + [f"{row.final[name]:.4f}" if name in row.final else "" for name in main]
        for row in rows
    ]
    done = sum(row.state == FINISHED for row in rows)
    parts = [
        f"{done} of {len(rows)} points are finished."
        + (
            f" {gone} earlier points are no longer in the sweep; their folders are kept, they are not shown."
            if gone
            else ""
        ),
        "## Over seeds",
        f"Mean ± half of the {CONFIDENCE:.0%} confidence interval (Student's t) over n seeds, after the last step, per "
        "scored token in nats; of one seed there is no interval.",
        text_tables.format_markdown([*(short[path] for path in axes), "n", *main], by_group),
        "## Points",
        text_tables.format_markdown(["id", *(short[path] for path in paths), "state", *main], by_point),
    ]
    return "\n\n".join(parts) + "\n"


def _hparams(points: Sequence[Point], paths: Sequence[str]) -> dict[str, dict[str, HParam]]:
    """Returns values by path and point id. Those of a path are all of one type, as TensorBoard requires."""
    hparams: dict[str, dict[str, HParam]] = {}
    for path in paths:
        values = {point.id: point.values[path] for point in points if path in point.values}
        if all(type(value) is bool for value in values.values()):
            hparams[path] = values
        elif all(type(value) in (int, float) for value in values.values()):
            hparams[path] = {key: float(value) for key, value in values.items()}
        else:
            hparams[path] = {key: table_text(value) for key, value in values.items()}
    return hparams


def _write_tensorboard(
    root: Path, rows: Sequence[Row], paths: Sequence[str], names: Sequence[str], shown: set[str]
) -> None:
    """Writes finished points as TensorBoard runs. `shown` holds the ids of those that it has already.

    TensorBoard fixes its columns at the first run that it reads. They are therefore written before any run, and
    everything is written anew when they change.
    """
    short = short_names(paths)
    hparams = _hparams([row.point for row in rows], paths)
    columns = {short[path]: list(values.values()) for path, values in hparams.items()}
    layout = {"hparams": columns, "metrics": list(names)}
    record = root / "columns.json"
    if not record.exists() or read_json(record, "the columns") != layout:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        write_columns(root, columns, names)
        write_json(record, layout)
        shown.clear()
    for row in rows:
        if not row.final or row.point.id in shown:
            continue
        name = re.sub(r"[^\w.=+-]+", ",", point_label(row.point, paths))[:100] + f",{row.point.id}"
        if not (root / name).exists():
            values = {
                short[path]: by_point[row.point.id] for path, by_point in hparams.items() if row.point.id in by_point
            }
            with new_folder(root / name) as partial:
                write_session(partial, name, values, row.curve)
        shown.add(row.point.id)
