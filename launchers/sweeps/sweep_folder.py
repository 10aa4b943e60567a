"""A sweep's folder, and what is known of each of its points.

OUT/sweep.json           the sweep's name, what it sweeps, its points and their values
OUT/configs/ID.json      a point's frozen record
OUT/points/ID/           its run folder, and sweep.log with all that it said
OUT/status/ID.json       how its last start ended
OUT/results.*, summary.csv, curves.csv, tensorboard/   what compares the points
"""

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.base.sweep_definition import Values
from kd_core.errors import UsageError, visible
from kd_core.files import damaged, is_owned, is_plain_file, read_json, read_text, write_json, write_text
from kd_core.json_fields import LARGEST, fields, integer, items, text
from kd_core.json_fields import shown as shown_field
from kd_core.training.checkpoints import checkpoint
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder
from experiments.config.sweep_points import ID_LENGTH, Point, shown, swept_paths

POINT_ID, JOB = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}"), re.compile(r"[A-Za-z0-9_.+-]{0,100}")
NEW, RUNNING, STOPPED, FAILED, FINISHED, SUBMITTED = "new", "running", "stopped", "failed", "finished", "submitted"
STATES = (NEW, RUNNING, STOPPED, FAILED, FINISHED, SUBMITTED)


@dataclass(frozen=True)
class Status:
    """How a point stands: `starts` so far, how the last one ended, and where a scheduler has it."""

    state: str = NEW
    starts: int = 0
    exit_code: int | None = None
    last_line: str = ""
    job: str = ""


def _read_status(path: Path) -> Status:
    what = "a point's status"
    with damaged(path, what, "Delete it: it forgets a failure or a job alone"):
        found = fields(read_json(path, what), "it", vars(Status()))
        if found["state"] not in STATES or not JOB.fullmatch(text(found["job"], "job")):
            raise ValueError(f"state {shown_field(found['state'])} of job {shown_field(found['job'])}")
        return Status(
            found["state"],
            integer(found["starts"], "starts", 0, LARGEST),
            None if found["exit_code"] is None else integer(found["exit_code"], "exit_code", -LARGEST, LARGEST),
            visible(text(found["last_line"], "last_line")),
            found["job"],
        )


def _plain(values: Values) -> dict[str, Any]:
    """Values for JSON: numbers and texts as they are, all else as tables show it."""
    return {
        path: value if isinstance(value, (str, int, float, bool, type(None))) else shown(value)
        for path, value in values.items()
    }


@dataclass(frozen=True)
class SweepFolder:
    """Paths of a sweep, and the files that tell of its points."""

    path: Path

    def run_folder(self, point_id: str) -> RunFolder:
        """The point's run folder."""
        return RunFolder(self.path / "points" / point_id)

    def config(self, point_id: str) -> Path:
        """The point's frozen record."""
        return self.path / "configs" / f"{point_id}.json"

    def log(self, point_id: str) -> Path:
        """Everything that the point's processes printed."""
        return self.path / "points" / point_id / "sweep.log"

    def _status(self, point_id: str) -> Path:
        return self.path / "status" / f"{point_id}.json"

    def claim(self, name: str, points: Sequence[Point]) -> list[dict[str, Any]]:
        """Write the records and `sweep.json`; returns earlier points that the sweep no longer has, which are kept.

        Raises:
            UsageError: the folder holds another sweep.
        """
        record, gone = self.path / "sweep.json", list[dict[str, Any]]()
        now = {point.id for point in points}
        if record.exists():
            gone = [point for point in self._known_points(record, name) if point["id"] not in now]
        for folder in ("configs", "points", "status"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for point in points:
            config = self.config(point.id)  # which is trained: no other text may stand under the point's name
            if not is_plain_file(config) or read_text(config, "a point's record") != point.record:
                write_text(config, point.record)
            known = self.status(point.id)
            if known.state == RUNNING and not known.job:  # who claims is the owner, so an earlier queue has died
                self.set_status(point.id, replace(known, state=STOPPED))
        described = [{"id": point.id, "values": _plain(point.values)} for point in points]
        write_json(record, {"sweep": name, "swept": swept_paths(points), "points": [*described, *gone]})
        return gone

    def _known_points(self, record: Path, name: str) -> list[dict[str, Any]]:
        """The points of an earlier start."""
        what = "a sweep's record"
        with damaged(record, what):
            known = read_json(record, what)
            if text(known["sweep"], "sweep") != name:
                raise UsageError(f"{self.path}: holds the sweep {known['sweep']!a}, not {name}. Name another --out.")
            points = [fields(point, "a point", ("id", "values")) for point in items(known["points"], "points")]
            for point in points:
                if not POINT_ID.fullmatch(text(point["id"], "id")):
                    raise ValueError(f"{shown_field(point['id'])} is no point's id")
            return points

    def status(self, point_id: str) -> Status:
        """How the point stands. That a run is finished is read from its folder; only failures must be remembered.

        What a queue here started has stopped once nobody owns the sweep's folder: points end with their queue.
        """
        path = self._status(point_id)
        known = _read_status(path) if path.exists() else Status()
        if self.run_folder(point_id).is_finished:
            return replace(known, state=FINISHED, exit_code=0)
        if known.state == RUNNING and not known.job and not is_owned(self.path):
            return replace(known, state=STOPPED)
        return known

    def left(self, points: Sequence[Point], retry_failed: bool) -> list[Point]:
        """Points to run: neither finished nor, unless they are to be tried again, failed."""
        done = (FINISHED,) if retry_failed else (FINISHED, FAILED)
        return [point for point in points if self.status(point.id).state not in done]

    def set_status(self, point_id: str, status: Status) -> None:
        """Write it down."""
        write_json(self._status(point_id), vars(status))

    def drop_checkpoints(self, point_ids: Iterable[str]) -> None:
        """Delete those of finished points: nothing goes on from them, and the students stand in `export/`."""
        for point_id in point_ids:
            if (run := self.run_folder(point_id)).is_finished:
                for step in run.checkpoints.glob("step_*"):
                    checkpoint.delete(step)  # but for one that is being read
                with contextlib.suppress(OSError):
                    run.checkpoints.rmdir()

    def metrics(self, point_id: str) -> list[dict[str, float]]:
        """The point's numbers so far."""
        path = self.run_folder(point_id).path / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def log_size(self, point_id: str) -> int:
        """Bytes that the point's processes have printed so far."""
        return self.log(point_id).stat().st_size if self.log(point_id).exists() else 0

    def said(self, point_id: str, since: int) -> str:
        """What they printed since it had so many bytes."""
        with self.log(point_id).open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace").replace("\r", "\n")
