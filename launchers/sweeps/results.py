"""What compares the points: `results.csv` (a row a point), `summary.csv` (over seeds), `curves.csv` (every validation),
`results.md`, `tensorboard/`.

Made of the points' own folders while they finish. A finished point is read once, and writing the tables takes at most a
tenth of the time, so the cost of a sweep grows with its points and not with their square. Nothing in the tables tells
when or how often a point was started.
"""

import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kd_core.errors import UsageError, visible
from kd_core.files import new_folder, read_json, write_json, write_text
from kd_core.training.loop import SHOWN
from kd_core.training.monitoring.tensorboard import HParam, write_columns, write_session
from launchers.reports import text_tables
from launchers.sweeps.sweep_folder import FINISHED, SweepFolder
from experiments.config.sweep_points import Point, label, short_names, shown, swept_paths
from launchers.sweeps.seed_statistics import CONFIDENCE, Mean, mean_of

SEED = "seed"
PAUSES = 9  # of what the tables took, until they are written anew
Line = dict[str, float]
log = logging.getLogger("kd")


@dataclass(frozen=True)
class Row:
    """A point, how it stands, and of a finished one the numbers after the last step, all validations, and precision."""

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
    final = {visible(name): value for name, value in (curve or [{}])[-1].items() if name != "step"}
    precision = folder.run_folder(point.id).precision() if point.config.parallel.precision == "auto" else None
    return Row(point, state, final, [line for line in curve if len(line) > 1], precision)


@dataclass
class Results:
    """The tables of a sweep while its points finish, of which `gone` earlier ones are no longer in the sweep."""

    folder: SweepFolder
    points: Sequence[Point]
    gone: int = 0
    keep_checkpoints: bool = True
    finished: dict[str, Row] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)  # points that TensorBoard has
    due: float = 0.0

    def rows(self) -> list[Row]:
        """Returns all points in the sweep's order."""
        return [self.finished.get(point.id) or self._read(point) for point in self.points]

    def _read(self, point: Point) -> Row:
        row = _row(self.folder, point)
        if row.state == FINISHED:
            self.finished[point.id] = row
            if not self.keep_checkpoints:
                self.folder.drop_checkpoints([point.id])
        return row

    def keep_up(self) -> None:
        """Write the tables, unless they were written so shortly before that they would take much of the time."""
        if time.monotonic() >= self.due:
            self.write()

    def write(self) -> str:
        """Write all of them; returns the Markdown."""
        begun = time.monotonic()
        rows, paths = self.rows(), swept_paths(self.points)
        names = metric_names(self.points, rows)
        groups, at = groups_of(rows, names), self.folder.path
        write_text(at / "results.csv", _points_csv(rows, paths, names))
        write_text(at / "summary.csv", _groups_csv(groups, paths, names))
        write_text(at / "curves.csv", _curves_csv(rows, paths, names))
        text = _markdown(rows, groups, paths, names, self.gone)
        write_text(at / "results.md", text)
        _write_tensorboard(at / "tensorboard", rows, paths, names, self.shown)
        self.due = time.monotonic() + PAUSES * (time.monotonic() - begun)
        return text


def write_results(folder: SweepFolder, points: Sequence[Point], gone: int = 0, *, keep_checkpoints: bool = True) -> str:
    """Write the tables once, and warn of what makes points incomparable; returns the Markdown."""
    results = Results(folder, points, gone, keep_checkpoints)
    text = results.write()
    _warn_of_precisions(list(results.finished.values()))
    return text


def metric_names(points: Sequence[Point], rows: Sequence[Row]) -> list[str]:
    """Names of what validation will give, known before any point runs; those that a run's log shows come first.

    What was measured stays, also where a cache is gone by now and nothing can be foretold.
    """
    known = {name for row in rows for name in row.final}
    for point in points:
        try:
            known |= point.validation_metrics
        except UsageError:
            continue  # a point that cannot be built has no numbers; `check` tells why
    first = [f"val/{name}" for name in SHOWN]
    return [name for name in first if name in known] + sorted(known - set(first))


@dataclass(frozen=True)
class Group:
    """Finished points that differ in their seed alone."""

    point: Point
    means: dict[str, Mean]
    n: int


def groups_of(rows: Sequence[Row], names: Sequence[str]) -> list[Group]:
    """Groups in the order of their first points."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.final:
            found.setdefault(row.point.but_for_the_seed, []).append(row)
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
        for members in found.values()
    ]


def _warn_of_precisions(rows: Sequence[Row]) -> None:
    """Warn where machines of several kinds have chosen several precisions for points that leave it to them."""
    taken = Counter(row.precision for row in rows if row.point.config.parallel.precision == "auto")
    if len(taken) > 1:
        log.warning(
            "points were trained in several precisions (%s), as their machines do well: compare them with care, or "
            "train anew with --config=parallel.precision=float32",
            ", ".join(f"{count} in {precision}" for precision, count in taken.items()),
        )


def _values(point: Point, paths: Sequence[str]) -> list[str]:
    return [shown(point.values[path]) if path in point.values else "" for path in paths]


def _numbers(found: dict[str, float], names: Sequence[str]) -> list[str]:
    """All digits; nothing where a number is not there."""
    return [repr(found[name]) if name in found else "" for name in names]


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
    return text_tables.comma_separated(["id", *paths, "state", *names], lines)


def _curves_csv(rows: Sequence[Row], paths: Sequence[str], names: Sequence[str]) -> str:
    """A row a validation of a finished point."""
    lines = [
        [row.point.id, *_values(row.point, paths), f"{found['step']:.0f}", *_numbers(found, names)]
        for row in rows
        if row.final
        for found in row.curve
    ]
    return text_tables.comma_separated(["id", *paths, "step", *names], lines)


def _groups_csv(groups: Sequence[Group], paths: Sequence[str], names: Sequence[str]) -> str:
    axes = [path for path in paths if path != SEED]
    head = [*axes, "n", *(each for name in names for each in (name, f"{name} ±"))]

    def cells(mean: Mean | None) -> tuple[str, str]:
        if mean is None:
            return "", ""
        return repr(mean.mean), "" if mean.half is None else repr(mean.half)

    lines = [
        [*_values(group.point, axes), str(group.n), *(cell for name in names for cell in cells(group.means.get(name)))]
        for group in groups
    ]
    return text_tables.comma_separated(head, lines)


def _with_interval(mean: Mean | None) -> str:
    if mean is None:
        return ""
    return f"{mean.mean:.4f}" + ("" if mean.half is None else f" ± {mean.half:.4f}")


def _markdown(
    rows: Sequence[Row], groups: Sequence[Group], paths: Sequence[str], names: Sequence[str], gone: int
) -> str:
    main = [name for name in names if name.removeprefix("val/") in SHOWN]
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
        text_tables.markdown([*(short[path] for path in axes), "n", *main], by_group),
        "## Points",
        text_tables.markdown(["id", *(short[path] for path in paths), "state", *main], by_point),
    ]
    return "\n\n".join(parts) + "\n"


def _hparams(points: Sequence[Point], paths: Sequence[str]) -> dict[str, dict[str, HParam]]:
    """Values by path and point, each path's of one type, as TensorBoard wants them."""
    found: dict[str, dict[str, HParam]] = {}
    for path in paths:
        values = {point.id: point.values[path] for point in points if path in point.values}
        if all(type(value) is bool for value in values.values()):
            found[path] = values
        elif all(type(value) in (int, float) for value in values.values()):
            found[path] = {key: float(value) for key, value in values.items()}
        else:
            found[path] = {key: shown(value) for key, value in values.items()}
    return found


def _write_tensorboard(
    root: Path, rows: Sequence[Row], paths: Sequence[str], names: Sequence[str], shown: set[str]
) -> None:
    """TensorBoard fixes its columns at the first run that it sees, so they are written before it, and all anew when
    they change. `shown` are points that it has already."""
    short = short_names(paths)
    hparams = _hparams([row.point for row in rows], paths)
    columns = {short[path]: list(values.values()) for path, values in hparams.items()}
    wanted = {"hparams": columns, "metrics": list(names)}
    record = root / "columns.json"
    if not record.exists() or read_json(record, "the columns") != wanted:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        write_columns(root, columns, names)
        write_json(record, wanted)
        shown.clear()
    for row in rows:
        if not row.final or row.point.id in shown:
            continue
        name = re.sub(r"[^\w.=+-]+", ",", label(row.point, paths))[:100] + f",{row.point.id}"
        if not (root / name).exists():
            values = {short[path]: each[row.point.id] for path, each in hparams.items() if row.point.id in each}
            with new_folder(root / name) as partial:
                write_session(partial, name, values, row.curve)
        shown.add(row.point.id)
