"""Runs as they lie on disk, finished or not: settings, provenance, numbers. What two of them differ by."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_core.errors import UsageError, visible
from kd_core.training.evaluation import best_is
from kd_core.training.metrics import read_metrics
from kd_core.training.run_folder import RunFolder, read_settings

Row = tuple[str, list[str]]
ABSENT = "–"
COUNT = re.compile(r"\d{1,15}")
CONSTANT = ("tokens", "teacher_nll", "teacher_mass", "teacher_entropy", "label_in_support")


@dataclass(frozen=True)
class Run:
    """A run: its folder, settings with who set each, the facts of its last start, and its lines of numbers."""

    folder: Path
    settings: dict[str, tuple[str, str]]
    facts: dict[str, Any]
    starts: int
    lines: list[dict[str, float]]

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.settings["steps"][0])

    def curve(self, metric: str, by_tokens: bool = False) -> list[tuple[float, float]]:
        """Where the metric stands: step (or positions read so far), value."""
        scale = int(self.settings["tokens_per_step"][0]) if by_tokens else 1
        return [(line["step"] * scale, line[metric]) for line in self.lines if metric in line]

    def final(self, metric: str) -> float | None:
        """The last value."""
        curve = self.curve(metric)
        return curve[-1][1] if curve else None

    def best(self, metric: str) -> tuple[float, int] | None:
        """The best value and its step."""
        curve = [(value, int(step)) for step, value in self.curve(metric)]
        if not curve:
            return None
        return (max if best_is(metric) == "max" else min)(curve, key=lambda point: point[0])


def read_run(folder: Path) -> Run:
    """A run's record.

    Raises:
        UsageError: the folder holds no run, or a file of it is damaged.
    """
    if not (folder / "config.txt").is_file():
        raise UsageError(f"{folder}: no run there (no config.txt). Wanted the --run_dir of launchers.train.")
    run, metrics = RunFolder(folder), folder / "metrics.jsonl"
    lines = (
        [{visible(name): value for name, value in line.items()} for line in read_metrics(metrics)]
        if (metrics.exists())
        else []
    )
    found = read_settings(run.settings_text())
    settings = {visible(path): (visible(value), visible(who)) for path, (value, who) in found.items()}
    for name in ("steps", "tokens_per_step"):
        if not COUNT.fullmatch(settings.get(name, ("", ""))[0]):
            raise UsageError(f"{folder / 'config.txt'}: has no whole number {name}. Restore it, or leave the run out.")
    return Run(folder, settings, run.last_facts(), len(run.attempts()), lines)


def labels(runs: list[Run]) -> list[str]:
    """A, B, C, … for the columns."""
    return [chr(ord("A") + index) for index in range(len(runs))]


def _rows(columns: list[dict[str, str]], everything: bool) -> list[Row]:
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, ABSENT) for column in columns]) for name in names]
    return [row for row in rows if everything or len(set(row[1])) > 1]


def settings_rows(runs: list[Run], everything: bool) -> list[Row]:
    """Settings that are not the same in all runs, or all."""
    return _rows([{name: value for name, (value, _) in run.settings.items()} for run in runs], everything)


def _together(sources: dict[str, str]) -> str:
    """One short hash for all files."""
    return f"{hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:12]}…" if sources else ABSENT


def _provenance(run: Run) -> dict[str, str]:
    facts = run.facts
    found = {
        "steps": f"{run.step} of {run.steps}",
        "starts": str(run.starts),
        "last start": facts.get("started", ABSENT),
        "code": facts.get("commit", ABSENT)[:12] + ("-dirty" if facts.get("commit", "").endswith("-dirty") else ""),
        "source files": _together(facts.get("sources", {})),
        "ranks": " ".join(f"{name}={value}" for name, value in facts.get("world", {}).items() if name != "pid"),
        "python": facts.get("python", ABSENT),
        **facts.get("versions", {}),
    }
    return {**found, **{name: f"{each['sha256'][:12]}…" for name, each in facts.get("inputs", {}).items()}}


def provenance_rows(runs: list[Run], everything: bool) -> list[Row]:
    """Progress always; of code, versions, layout and data what is not the same, or all."""
    rows = _rows([_provenance(run) for run in runs], everything=True)
    return [row for row in rows if everything or len(set(row[1])) > 1 or row[0] == "steps"]


def metric_names(runs: list[Run]) -> list[str]:
    """Names of curves, val/ first, those of the reader's first look at the head."""
    names = {name for run in runs for line in run.lines for name in line if name.startswith(("val/", "train/"))}
    first = {name: place for place, name in enumerate(("val/loss", "val/kl", "val/nll", "train/loss"))}
    return sorted(names, key=lambda name: (first.get(name, 9), not name.startswith("val/"), name))


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"


def _with_difference(values: list[float | None]) -> list[str]:
    """Numbers, from the second on with their difference to the first."""
    first = values[0]
    shown = [_number(values[0])]
    for value in values[1:]:
        difference = "" if value is None or first is None else f" ({value - first:+.4f})"
        shown.append(_number(value) + difference)
    return shown


def metric_rows(runs: list[Run], everything: bool) -> list[Row]:
    """Last values with their differences to the first run's, and the best of the held-out ones."""
    rows: list[Row] = []
    for name in metric_names(runs):
        if not everything and name.endswith(CONSTANT):
            continue
        rows.append((name, _with_difference([run.final(name) for run in runs])))
        if not (name.startswith("val/") and best_is(name)):
            continue
        best = [run.best(name) for run in runs]
        if any(found is not None and found[1] != run.step for found, run in zip(best, runs, strict=True)):
            shown = [f"{_number(found[0])} at {found[1]}" if found else ABSENT for found in best]
            rows.append((f"  best {name}", shown))
    return rows
