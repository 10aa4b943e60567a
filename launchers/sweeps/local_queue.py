"""Points on this machine: a queue over shares of it, a process a point.

waiting ─start─► running ─┬─ complete ────────► finished
   ▲                      ├─ an error ────────► failed (kept, said, and the others go on)
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

from launchers.sweeps import point_process
from launchers.sweeps.point_process import SAVING, Slot
from launchers.sweeps.sweep_folder import FAILED, FINISHED, RUNNING, STOPPED, Status, SweepFolder
from launchers.sweeps.live_table import Live
from experiments.config.sweep_points import Point, label, swept_paths

MOST_INTERRUPTIONS = 3
PAUSE, REDRAW = 0.05, 1.0


class StoppedError(Exception):
    """A signal asked the queue to stop; its children have."""

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
    """The points that wait and run; `finished` is called after each one that ends well."""

    folder: SweepFolder
    points: Sequence[Point]
    slots: Sequence[Slot]
    nproc: int
    finished: Callable[[], object]
    running: list[_Running] = field(default_factory=list)
    interruptions: dict[str, int] = field(default_factory=dict)
    asked: int = 0

    def __post_init__(self) -> None:
        self.waiting, self.free = deque(self.points), deque(self.slots)
        self.paths = swept_paths(self.points)
        self.live = Live(["running", "step", "of", "loss", "values"], self._rows)

    def run(self) -> None:
        """Run them all.

        Raises:
            StoppedError: by SIGINT or SIGTERM, after the children have ended.
        """
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._run()
        finally:
            self._end_children()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> None:
        drawn = 0.0
        while self.waiting or self.running:
            if self.asked:
                raise StoppedError(self.asked)
            while self.waiting and self.free:
                self._start(self.waiting.popleft(), self.free.popleft())
            for each in [each for each in self.running if each.process.poll() is not None]:
                self._settle(each)
            if time.monotonic() - drawn > REDRAW:
                self.live.draw()
                drawn = time.monotonic()
            time.sleep(PAUSE)

    def _ask(self, number: int, _: Any) -> None:
        self.asked = number

    def _start(self, point: Point, slot: Slot) -> None:
        command = point_process.training_line(self.folder, point.id, point_process.on_this_machine(self.nproc))
        starts = self.folder.status(point.id).starts + 1
        self.folder.set_status(point.id, Status(RUNNING, starts))
        since = self.folder.log_size(point.id)
        self.running.append(_Running(point, slot, point_process.start(command, self.folder, point.id, slot), since))
        self.live.say(f"{point.id} started   {label(point, self.paths)}")

    def _settle(self, ended: _Running) -> None:
        """Note how it ended and free its share."""
        self.running.remove(ended)
        self.free.append(ended.slot)
        point, code = ended.point, ended.process.returncode
        state, words = self._outcome(ended)
        known = self.folder.status(point.id)
        self.folder.set_status(point.id, replace(known, state=state, exit_code=code, last_line=words))
        if state == FINISHED:
            self.live.say(f"{point.id} finished  {label(point, self.paths)}")
            self.finished()
        elif state == FAILED:
            log = self.folder.log(point.id)
            self.live.say(f"{point.id} failed    {label(point, self.paths)} (exit code {code}): {words} ({log})")
        else:
            self.live.say(f"{point.id} stopped   {label(point, self.paths)}: goes on from its checkpoint")
            self.waiting.append(point)

    def _outcome(self, ended: _Running) -> tuple[str, str]:
        """State and last words; a point that is interrupted again and again has failed."""
        point, code = ended.point, ended.process.returncode
        state, words = point_process.outcome(self.folder, point.id, code, ended.since)
        if state == STOPPED:
            count = self.interruptions[point.id] = self.interruptions.get(point.id, 0) + 1
            state = STOPPED if count <= MOST_INTERRUPTIONS else FAILED
        return state, words

    def _end_children(self) -> None:
        """Ask them to save and stop; after a while, or when asked again, make them."""
        for each in self.running:
            each.process.terminate()
        self.asked, deadline = 0, time.monotonic() + SAVING
        for each in self.running:
            while each.process.poll() is None and time.monotonic() < deadline and not self.asked:
                time.sleep(PAUSE)
            if each.process.poll() is None:
                os.killpg(each.process.pid, signal.SIGKILL)
                each.process.wait()
            self.folder.set_status(each.point.id, replace(self.folder.status(each.point.id), state=STOPPED))
        self.running.clear()

    def _rows(self) -> list[list[str]]:
        rows: list[list[str]] = []
        for each in self.running:
            lines = self.folder.metrics(each.point.id)
            step = f"{lines[-1]['step']:.0f}" if lines else ""
            losses = [line["train/loss"] for line in lines if "train/loss" in line]
            loss = f"{losses[-1]:.4f}" if losses else ""
            rows.append([each.point.id, step, str(each.point.steps), loss, label(each.point, self.paths)])
        return [*rows, [f"{len(self.waiting)} wait", "", "", "", ""]]
