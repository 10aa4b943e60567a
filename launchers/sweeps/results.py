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

from experiments.config.sweep_points import Point, point_label, short_names, swept_paths, table_text
from kd_core.files import new_folder, read_json, write_json, write_text
from kd_core.losses.metric_table import BRIEF
from kd_core.training.monitoring.tensorboard import HParam, write_columns, write_session
from launchers.reports import text_tables
from launchers.reports.runs import OTHER
from launchers.sweeps.point_results import Group, Row, group_by_seed, metric_names, other_quantities, read_row
from launchers.sweeps.seed_statistics import CONFIDENCE, Mean
from launchers.sweeps.sweep_folder import FINISHED, SweepFolder

SEED = "seed"
PAUSES = 9  # the tables are next written after this many times the seconds that writing them took
log = logging.getLogger("kd")


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
        return [self.finished.get(point.id) or read_row(self.folder, point) for point in self.points]

    def settle(self, rows: Sequence[Row]) -> None:
        """Keeps the rows of points that have finished since, and drops their checkpoints unless these are kept."""
        new = {row.point.id: row for row in rows if row.state == FINISHED and row.point.id not in self.finished}
        self.finished |= new
        if not self.keep_checkpoints:
            self.folder.drop_checkpoints(list(new))

    def write_if_due(self) -> None:
        """Writes the tables, unless they were written so recently that this would take too much of the time."""
        if time.monotonic() >= self.due:
            self.write()

    def write(self) -> str:
        """Writes all tables, and returns the Markdown."""
        started = time.monotonic()
        rows, paths = self.rows(), swept_paths(self.points)
        self.settle(rows)
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
    shown = [name for name in names if name.removeprefix("val/") in BRIEF]
    others = other_quantities(rows, shown)
    # Numbers of different quantities come last. Nothing is then better to compare by than the KL.
    main = sorted(shown, key=lambda name: (name in others, bool(others) and name != "val/kl"))
    titles = [f"{name} ({OTHER})" if name in others else name for name in main]
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
    settings = ", ".join(dict.fromkeys(path for paths in others.values() for path in paths))
    notes = [f"{OTHER}: another quantity at some points than at others, by {settings}."] if others else []
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
        text_tables.format_markdown([*(short[path] for path in axes), "n", *titles], by_group),
        *notes,
        "## Points",
        text_tables.format_markdown(["id", *(short[path] for path in paths), "state", *titles], by_point),
        *notes,
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
