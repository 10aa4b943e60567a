"""Folder of a sweep, and the state of each of its points.

    OUT/sweep.json           the sweep's name, its swept paths, its points and their values
    OUT/configs/ID.json      a point's frozen record
    OUT/points/ID/           its run folder, with its processes' output in sweep.log
    OUT/status/ID.json       how its last start ended
    OUT/results.*, summary.csv, curves.csv, tensorboard/   tables that compare the points

Whether a point is finished is read from its run folder, so a status only has to keep failures and jobs.
"""

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.base.sweep_definition import Values
from experiments.config.sweep_points import ID_LENGTH, Point, swept_paths, table_text
from kd_core.errors import UsageError, escape_unprintable
from kd_core.files import damage_as_usage_error, is_owned, is_plain_file, read_json, read_text, write_json, write_text
from kd_core.json_fields import LARGEST, check_integer, check_list, check_object, check_text
from kd_core.json_fields import short_repr as shown_field
from kd_core.training.checkpoints import checkpoint
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.run_folder import RunFolder

POINT_ID, JOB = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}"), re.compile(r"[A-Za-z0-9_.+-]{0,100}")
NEW, RUNNING, STOPPED, FAILED, FINISHED, SUBMITTED = "new", "running", "stopped", "failed", "finished", "submitted"
STATES = (NEW, RUNNING, STOPPED, FAILED, FINISHED, SUBMITTED)


@dataclass(frozen=True)
class Status:
    """State of a point: its `starts` so far, how the last one ended, and its job at a scheduler."""

    state: str = NEW
    starts: int = 0
    exit_code: int | None = None
    last_line: str = ""
    job: str = ""


def _read_status(path: Path) -> Status:
    description = "a point's status"
    with damage_as_usage_error(path, description, "Delete it: it forgets a failure or a job alone"):
        values = check_object(read_json(path, description), "it", vars(Status()))
        if values["state"] not in STATES or not JOB.fullmatch(check_text(values["job"], "job")):
            raise ValueError(f"state {shown_field(values['state'])} of job {shown_field(values['job'])}")
        return Status(
            values["state"],
            check_integer(values["starts"], "starts", 0, LARGEST),
            None if values["exit_code"] is None else check_integer(values["exit_code"], "exit_code", -LARGEST, LARGEST),
            escape_unprintable(check_text(values["last_line"], "last_line")),
            values["job"],
        )


def _json_values(values: Values) -> dict[str, Any]:
    """Converts values for JSON: numbers and texts stay, all else becomes the text that tables show."""
    return {
        path: value if isinstance(value, (str, int, float, bool, type(None))) else table_text(value)
        for path, value in values.items()
    }


@dataclass(frozen=True)
class SweepFolder:
    """Paths of a sweep, and the files that describe its points."""

    path: Path

    def run_folder(self, point_id: str) -> RunFolder:
        return RunFolder(self.path / "points" / point_id)

    def config(self, point_id: str) -> Path:
        """Returns the path of the point's frozen record."""
        return self.path / "configs" / f"{point_id}.json"

    def log(self, point_id: str) -> Path:
        """Returns the path of the log that holds all output of the point's processes."""
        return self.path / "points" / point_id / "sweep.log"

    def _status_path(self, point_id: str) -> Path:
        return self.path / "status" / f"{point_id}.json"

    def claim(self, name: str, points: Sequence[Point]) -> list[dict[str, Any]]:
        """Writes the records and `sweep.json`. Returns earlier points that are no longer in the sweep, which are kept.

        Raises:
            UsageError: the folder holds another sweep.
        """
        record, gone = self.path / "sweep.json", list[dict[str, Any]]()
        ids = {point.id for point in points}
        if record.exists():
            gone = [point for point in self._earlier_points(record, name) if point["id"] not in ids]
        for folder in ("configs", "points", "status"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for point in points:
            config = self.config(point.id)  # it is what will be trained, so it must hold the point's record
            if not is_plain_file(config) or read_text(config, "a point's record") != point.record:
                write_text(config, point.record)
            status = self.status(point.id)
            if status.state == RUNNING and not status.job:  # the caller owns the folder, so an earlier queue has died
                self.set_status(point.id, replace(status, state=STOPPED))
        entries = [{"id": point.id, "values": _json_values(point.values)} for point in points]
        write_json(record, {"sweep": name, "swept": swept_paths(points), "points": [*entries, *gone]})
        return gone

    def _earlier_points(self, record: Path, name: str) -> list[dict[str, Any]]:
        """Returns the points of an earlier start."""
        description = "a sweep's record"
        with damage_as_usage_error(record, description):
            content = read_json(record, description)
            if check_text(content["sweep"], "sweep") != name:
                raise UsageError(
                    f"{self.path}: holds the sweep {content['sweep']!a}, not {name}. Choose another --out."
                )
            points = [
                check_object(point, "a point", ("id", "values")) for point in check_list(content["points"], "points")
            ]
            for point in points:
                if not POINT_ID.fullmatch(check_text(point["id"], "id")):
                    raise ValueError(f"{shown_field(point['id'])} is no point's id")
            return points

    def status(self, point_id: str) -> Status:
        """Returns the state of the point.

        Its run folder shows whether it is finished, so only failures are recorded. A point that a queue on this machine
        started ends with its queue. It has stopped once nobody owns the sweep's folder.
        """
        path = self._status_path(point_id)
        status = _read_status(path) if path.exists() else Status()
        if self.run_folder(point_id).is_finished:
            return replace(status, state=FINISHED, exit_code=0)
        if status.state == RUNNING and not status.job and not is_owned(self.path):
            return replace(status, state=STOPPED)
        return status

    def left(self, points: Sequence[Point], retry_failed: bool) -> list[Point]:
        """Returns the points to run: those not finished and, unless `retry_failed`, not failed."""
        done = (FINISHED,) if retry_failed else (FINISHED, FAILED)
        return [point for point in points if self.status(point.id).state not in done]

    def set_status(self, point_id: str, status: Status) -> None:
        write_json(self._status_path(point_id), vars(status))

    def drop_checkpoints(self, point_ids: Iterable[str]) -> None:
        """Deletes the checkpoints of finished points. Nothing resumes from them, and `export/` holds the students."""
        for point_id in point_ids:
            if (run := self.run_folder(point_id)).is_finished:
                for step in run.checkpoints.glob("step_*"):
                    checkpoint.delete(step)  # except one that is being read
                with contextlib.suppress(OSError):
                    run.checkpoints.rmdir()

    def metrics(self, point_id: str) -> list[dict[str, float]]:
        """Returns the lines of the point's metrics so far."""
        path = self.run_folder(point_id).path / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def log_size(self, point_id: str) -> int:
        """Returns the size of the point's log in bytes."""
        return self.log(point_id).stat().st_size if self.log(point_id).exists() else 0

    def log_since(self, point_id: str, since: int) -> str:
        """Returns the point's log from byte `since` on, with carriage returns as line breaks."""
        with self.log(point_id).open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace").replace("\r", "\n")
