"""Queue that runs points on this machine: a process per point, on a share of the machine.

waiting ─start─► running ─┬─ complete ────────► finished
   ▲                      ├─ an error ────────► failed (reported, and the others go on)
   └──── ended by a signal, or stopped early ◄─┘  (it resumes from its checkpoint)
"""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.config.sweep_points import Point, point_label, swept_paths
from launchers.sweeps import point_process
from launchers.sweeps.live_table import LiveTable
from launchers.sweeps.point_process import SAVING, Slot
from launchers.sweeps.sweep_folder import FAILED, FINISHED, RUNNING, STOPPED, Status, SweepFolder

MOST_INTERRUPTIONS = 3
PAUSE, REDRAW = 0.05, 1.0


class StoppedError(Exception):
    """A signal asked the queue to stop, and its children have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _Running:
    point: Point
    slot: Slot
    process: subprocess.Popen[bytes]
    since: int


@dataclass
class Queue:
    """Waiting and running points. `on_finished` is called after each point that ends well."""

    folder: SweepFolder
    points: Sequence[Point]
    slots: Sequence[Slot]
    nproc: int
    on_finished: Callable[[], object]
    running: list[_Running] = field(default_factory=list)
    interruptions: dict[str, int] = field(default_factory=dict)
    signal_number: int = 0

    def __post_init__(self) -> None:
        self.waiting, self.free = deque(self.points), deque(self.slots)
        self.paths = swept_paths(self.points)
        self.live = LiveTable(["running", "step", "of", "loss", "values"], self._rows)

    def run(self) -> None:
        """Runs all points.

        Raises:
            StoppedError: by SIGINT or SIGTERM, after the children have ended.
        """
        handlers_before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._run()
        finally:
            self._end_children()
            for number, handler in handlers_before.items():
                signal.signal(number, handler)

    def _run(self) -> None:
        last_drawn = 0.0
        while self.waiting or self.running:
            if self.signal_number:
                raise StoppedError(self.signal_number)
            while self.waiting and self.free:
                self._start(self.waiting.popleft(), self.free.popleft())
            for child in [child for child in self.running if child.process.poll() is not None]:
                self._settle(child)
            if time.monotonic() - last_drawn > REDRAW:
                self.live.draw()
                last_drawn = time.monotonic()
            time.sleep(PAUSE)

    def _on_signal(self, number: int, _: Any) -> None:
        self.signal_number = number

    def _start(self, point: Point, slot: Slot) -> None:
        command = point_process.training_command(self.folder, point.id, point_process.standalone_options(self.nproc))
        starts = self.folder.status(point.id).starts + 1
        self.folder.set_status(point.id, Status(RUNNING, starts))
        since = self.folder.log_size(point.id)
        self.running.append(_Running(point, slot, point_process.start(command, self.folder, point.id, slot), since))
        self.live.say(f"{point.id} started   {point_label(point, self.paths)}")

    def _settle(self, child: _Running) -> None:
        """Records how a point ended, and frees its share of the machine."""
        self.running.remove(child)
        self.free.append(child.slot)
        point, code = child.point, child.process.returncode
        state, last_line = self._outcome(child)
        status = self.folder.status(point.id)
        self.folder.set_status(point.id, replace(status, state=state, exit_code=code, last_line=last_line))
        if state == FINISHED:
            self.live.say(f"{point.id} finished  {point_label(point, self.paths)}")
            self.on_finished()
        elif state == FAILED:
            log = self.folder.log(point.id)
            self.live.say(
                f"{point.id} failed    {point_label(point, self.paths)} (exit code {code}): {last_line} ({log})"
            )
        else:
            self.live.say(f"{point.id} stopped   {point_label(point, self.paths)}: goes on from its checkpoint")
            self.waiting.append(point)

    def _outcome(self, child: _Running) -> tuple[str, str]:
        """Returns the point's state and the last line of its log. Too many interruptions count as a failure."""
        point, code = child.point, child.process.returncode
        state, last_line = point_process.outcome(self.folder, point.id, code, child.since)
        if state == STOPPED:
            count = self.interruptions[point.id] = self.interruptions.get(point.id, 0) + 1
            state = STOPPED if count <= MOST_INTERRUPTIONS else FAILED
        return state, last_line

    def _end_children(self) -> None:
        """Asks the children to save and stop. Kills them after `SAVING` seconds, or at another signal."""
        for child in self.running:
            child.process.terminate()
        self.signal_number, deadline = 0, time.monotonic() + SAVING
        for child in self.running:
            while child.process.poll() is None and time.monotonic() < deadline and not self.signal_number:
                time.sleep(PAUSE)
            if child.process.poll() is None:
                os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
            self.folder.set_status(child.point.id, replace(self.folder.status(child.point.id), state=STOPPED))
        self.running.clear()

    def _rows(self) -> list[list[str]]:
        rows: list[list[str]] = []
        for child in self.running:
            lines = self.folder.metrics(child.point.id)
            step = f"{lines[-1]['step']:.0f}" if lines else ""
            losses = [line["train/loss"] for line in lines if "train/loss" in line]
            loss = f"{losses[-1]:.4f}" if losses else ""
            rows.append([child.point.id, step, str(child.point.steps), loss, point_label(child.point, self.paths)])
        return [*rows, [f"{len(self.waiting)} wait", "", "", "", ""]]
