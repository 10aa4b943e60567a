"""What a sweep's tables cost while a thousand points finish."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.base.sweep_definition import Sweep, grid, seeds
from experiments.config.sweep_points import Point, resolve_points
from experiments.half_depth import quickstart
from launchers.sweeps import results
from launchers.sweeps.results import Results, write_results
from launchers.sweeps.sweep_folder import SweepFolder
from tests.launchers.command import table
from tests.tiny import Tiny


def _points(tiny: Tiny, n: int) -> list[Point]:
    """As many as wanted of one graph, which takes no time to resolve."""
    (point,) = resolve_points(Sweep(quickstart) * seeds(1), tiny.train_items()[1:], "study")
    return [replace(point, id=f"{i:012x}", values={**point.values, "seed": i}) for i in range(n)]


def _finish(folder: SweepFolder, point: Point, tiny: Tiny) -> None:
    run = folder.run_folder(point.id)
    run.checkpoints.mkdir(parents=True)
    shutil.copytree(tiny.teacher, run.export, copy_function=os.link)
    lines = [{"step": step, "val/nll": 5.0 - step + point.values["seed"] / 1000} for step in range(3)]
    (run.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.parametrize("n", [20, 200])
def test_time_for_tables_grows_with_the_points(
    n: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, points = SweepFolder(tmp_path), _points(tiny, n)
    now, spent, reads = [0.0], [0.0], Counter[str]()
    wrote, metrics = results.write_text, SweepFolder.metrics

    def write(path: Path, text: str) -> None:
        cost = text.count("\n") / 10  # of a table of 200 lines 20 s, so 2 hours if all were written after every point
        now[0] += cost
        spent[0] += cost
        wrote(path, text)

    def read(self: SweepFolder, point_id: str) -> Any:
        reads[point_id] += 1
        return metrics(self, point_id)

    monkeypatch.setattr(results, "write_text", write)
    monkeypatch.setattr(SweepFolder, "metrics", read)
    monkeypatch.setattr(results.time, "monotonic", lambda: now[0])
    kept_up = Results(folder, points, keep_checkpoints=False)
    for i, point in enumerate(points):
        now[0] += 60.0
        _finish(folder, point, tiny)
        kept_up.write_if_due()
        if i == 0:  # where the tables cost little, they are there after every point
            assert [row["state"] for row in table(folder.path / "results.csv")] == ["finished"] + ["new"] * (n - 1)
    kept_up.write()
    assert spent[0] <= now[0] / 10 + n  # and once at the end
    assert set(reads.values()) == {1}
    assert len(reads) == n
    assert not any(folder.run_folder(point.id).checkpoints.exists() for point in points)
    tables = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    monkeypatch.undo()
    assert write_results(folder, points).startswith(f"{n} of {n} points are finished.")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == tables
    assert [row["val/nll"] for row in table(tmp_path / "results.csv")] == [repr(3.0 + i / 1000) for i in range(n)]


def test_a_loss_that_differs_between_points_is_marked_and_comes_last(tiny: Tiny, tmp_path: Path) -> None:
    swept = Sweep(quickstart) * grid("loss.terms.kd.temperature", [1.0, 2.0]) * seeds(2)
    folder, points = SweepFolder(tmp_path), resolve_points(swept, tiny.train_items()[1:], "study")
    for point in points:
        _finish(folder, point, tiny)
        run = folder.run_folder(point.id).path
        values = {"val/loss": 1.0, "val/nll": 3.0, "val/kl": 2.0}
        (run / "metrics.jsonl").write_text(json.dumps({"step": 2, **values}) + "\n")
        (run / "config.txt").write_text("".join(f"{path} = {value}  # swept\n" for path, value in point.values.items()))
    different = write_results(folder, points)
    titles = [line for line in different.splitlines() if "val/" in line]
    assert [line.count("| val/kl | val/nll |") for line in titles] == [1, 1]
    assert all(line.endswith("| val/loss (≠) |") for line in titles)
    assert different.count("\n\n≠: another quantity at some points than at others, by loss.terms.kd.temperature.") == 2
    same = write_results(folder, points[:2])
    assert same.count("| val/loss | val/nll | ") == 2
    assert "≠" not in same
