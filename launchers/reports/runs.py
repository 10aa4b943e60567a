"""Runs read from their folders, finished or not, and tables of the settings, provenance and metrics that differ."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config.record_diff import DEFAULT
from kd_core.errors import UsageError, escape_unprintable
from kd_core.losses.metric_table import METRICS
from kd_core.training.evaluation import metric_direction
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder, read_settings

Row = tuple[str, list[str]]
ABSENT = "–"
COUNT = re.compile(r"\d{1,15}")
MOST_FILES = 10
OTHER, CONTENTS = "≠", ": contents"
# Curves that are shown first.
MAIN_CURVES = ("val/loss", "val/kl", "val/nll", "train/loss")


@dataclass(frozen=True)
class Run:
    """A run: its folder, settings with who set each, the facts of its last start, and its logged metrics by step."""

    folder: Path
    settings: dict[str, tuple[str, str]]
    facts: dict[str, Any]
    starts: int
    lines: list[dict[str, float]]

    @property
    def step(self) -> int:
        """Returns the last step that was logged."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def steps(self) -> int:
        return int(self.settings["steps"][0])

    @functools.cached_property
    def deciding(self) -> dict[str, str]:
        return deciding_settings({path: value for path, (value, _) in self.settings.items()}, self.facts)

    def curve(self, metric: str, by_tokens: bool = False) -> list[tuple[float, float]]:
        """Returns the points of a metric: step (or positions read so far) and value."""
        scale = int(self.settings["tokens_per_step"][0]) if by_tokens else 1
        return [(line["step"] * scale, line[metric]) for line in self.lines if metric in line]

    def final(self, metric: str) -> float | None:
        curve = self.curve(metric)
        return curve[-1][1] if curve else None

    def best(self, metric: str) -> tuple[float, int] | None:
        """Returns the best value and its step."""
        curve = [(value, int(step)) for step, value in self.curve(metric)]
        if not curve:
            return None
        return (max if metric_direction(metric) == "max" else min)(curve, key=lambda point: point[0])


def read_run(folder: Path) -> Run:
    """Reads a run.

    Raises:
        UsageError: the folder holds no run, or a file of it is damaged.
    """
    if not (folder / "config.txt").is_file():
        raise UsageError(f"{folder}: no run there (no config.txt). Wanted the --run_dir of launchers.train.")
    run, metrics = RunFolder(folder), folder / "metrics.jsonl"
    lines = (
        [{escape_unprintable(name): value for name, value in line.items()} for line in read_metrics(metrics)]
        if (metrics.exists())
        else []
    )
    raw_settings = read_settings(run.settings_text())
    settings = {
        escape_unprintable(path): (escape_unprintable(value), escape_unprintable(who))
        for path, (value, who) in raw_settings.items()
    }
    for name in ("steps", "tokens_per_step"):
        if not COUNT.fullmatch(settings.get(name, ("", ""))[0]):
            raise UsageError(f"{folder / 'config.txt'}: has no whole number {name}. Restore it, or leave the run out.")
    return Run(folder, settings, run.last_facts(), len(run.attempts()), lines)


def column_titles(runs: list[Run]) -> list[str]:
    """Returns A, B, C, … as titles of the columns."""
    return [chr(ord("A") + index) for index in range(len(runs))]


def _rows(columns: list[dict[str, str]], everything: bool) -> list[Row]:
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, ABSENT) for column in columns]) for name in names]
    differing, same = ([row for row in rows if (len(set(row[1])) > 1) is differs] for differs in (True, False))
    return [*differing, *(same if everything else ())]


def settings_rows(runs: list[Run], everything: bool) -> list[Row]:
    """Returns the settings that differ between runs, followed with `everything` by those that do not.

    Defaults of a part that some run lacks are left out without `everything`.
    """
    rows = _rows([{name: value for name, (value, _) in run.settings.items()} for run in runs], everything)
    return [row for row in rows if everything or not _is_default_of_missing_part(row[0], runs)]


def _is_default_of_missing_part(name: str, runs: list[Run]) -> bool:
    """Checks whether some run lacks the setting, and all others leave it at its default."""
    origins = [run.settings[name][1] for run in runs if name in run.settings]
    return len(origins) < len(runs) and all(origin.startswith(DEFAULT) for origin in origins)


def _provenance(run: Run) -> dict[str, str]:
    facts = run.facts
    values = {
        "steps": f"{run.step} of {run.steps}",
        "starts": str(run.starts),
        "last start": facts.get("started", ABSENT),
        "code": facts.get("commit", ABSENT)[:12] + ("-dirty" if facts.get("commit", "").endswith("-dirty") else ""),
        "ranks": " ".join(f"{name}={value}" for name, value in facts.get("world", {}).items() if name != "pid"),
        "python": facts.get("python", ABSENT),
        **facts.get("versions", {}),
    }
    return {**values, **{name: f"{item['sha256'][:12]}…" for name, item in facts.get("inputs", {}).items()}}


def provenance_rows(runs: list[Run], everything: bool) -> list[Row]:
    """Returns the progress of each run, and what differs of code, versions, layout, data and source files.

    With `everything`, code, versions, layout and data that are the same are returned too.
    """
    rows = _rows([_provenance(run) for run in runs], everything=True)
    files = _rows(
        [{f"code {name}": f"{sha[:12]}…" for name, sha in run.facts.get("sources", {}).items()} for run in runs], False
    )
    more = [(f"… and {len(files) - MOST_FILES} more files", [""] * len(runs))] if len(files) > MOST_FILES else []
    shown = [row for row in rows if everything or len(set(row[1])) > 1 or row[0] == "steps"]
    return [*shown, *files[:MOST_FILES], *more]


def metric_names(runs: list[Run]) -> list[str]:
    """Returns the names of curves: the most important ones, then those of val/, then those of train/."""
    names = {name for run in runs for line in run.lines for name in line if name.startswith(("val/", "train/"))}
    first = {name: place for place, name in enumerate(MAIN_CURVES)}
    return sorted(names, key=lambda name: (first.get(name, 9), not name.startswith("val/"), name))


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"


def _subject(name: str) -> str | None:
    row = METRICS.get(name.rpartition("/")[2])
    return row.subject if row else None


def _decides(name: str, setting: str) -> bool:
    """Returns True if two runs must agree in a setting for their numbers of that name to be the same quantity.

    These settings are the objective of a loss (for one term its settings but the weight), the function of a user's
    metric, and the held-out caches.
    """
    metric = name.rpartition("/")[2]
    if setting.startswith("loss."):
        of_term = setting.startswith(f"loss.terms.{metric.removesuffix('_loss')}.") and ".weight" not in setting
        return setting != "loss.chunk_tokens" and (metric == "loss" or (metric.endswith("_loss") and of_term))
    held_out = setting.startswith("evaluation.shards") and not setting.endswith("path") and name.startswith("val/")
    # These metrics depend on the caches' contents, but not on how their teacher data are read.
    of_text = _subject(name) == "text" and not setting.endswith(CONTENTS)
    return (held_out and not of_text) or setting == f"metric {metric}"


def deciding_settings(values: dict[str, str], facts: dict[str, Any]) -> dict[str, str]:
    """Returns a run's settings, the hashes of its inputs, and the functions of the user's metrics."""
    functions = re.findall(r"[\w.]+", values.get("evaluation.metrics", ""))
    return {
        **values,
        **{f"{path}{CONTENTS}": item["sha256"] for path, item in facts.get("inputs", {}).items()},
        **{f"metric {function.rpartition('.')[2]}": function for function in functions},
    }


def incomparable(name: str, runs: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the settings that make numbers of that name different quantities in runs of these `deciding_settings`."""
    paths = dict.fromkeys(path for settings in runs for path in settings)
    return [path for path in paths if _decides(name, path) and len({settings.get(path) for settings in runs}) > 1]


def _with_difference(name: str, runs: list[Run]) -> list[str]:
    """Returns each run's last value, with the difference to the first run's where the quantity is the same."""
    first = runs[0].final(name)
    cells = [_number(first)]
    for run in runs[1:]:
        value = run.final(name)
        difference = (
            OTHER
            if incomparable(name, [runs[0].deciding, run.deciding])
            else ""
            if value is None or first is None
            else f"{value - first:+.4f}"
        )
        cells.append(f"{_number(value)} ({difference})" if difference and value is not None else _number(value))
    return cells


def other_quantities(runs: list[Run]) -> str:
    """Returns a note about the sign that replaces a difference, or an empty text if there is no such sign."""
    settings = {
        path: None
        for name in metric_names(runs)
        for run in runs[1:]
        for path in incomparable(name, [runs[0].deciding, run.deciding])
    }
    return f"{OTHER}: another quantity than in A, by {', '.join(settings)}." if settings else ""


def metric_rows(runs: list[Run], everything: bool) -> list[Row]:
    """Returns last values with their differences to the first run's, and the best values of held-out metrics."""
    rows: list[Row] = []
    for name in metric_names(runs):
        if not everything and _subject(name) == "teacher":
            continue
        rows.append((name, _with_difference(name, runs)))
        if not (name.startswith("val/") and metric_direction(name)):
            continue
        best = [run.best(name) for run in runs]
        if any(point is not None and point[1] != run.step for point, run in zip(best, runs, strict=True)):
            cells = [f"{_number(point[0])} at {point[1]}" if point else ABSENT for point in best]
            rows.append((f"  best {name}", cells))
    return rows
