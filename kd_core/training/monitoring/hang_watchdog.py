"""A hang ends in one message: who did not arrive, and where it was.

The training thread says where it is (`Pulse`). A thread beside it tells the other ranks through the store; when the
training thread has not moved for the timeout, it compares all ranks, says who is behind, and ends the process. A rank
that is dead rather than hung is found by torchrun.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from kd_core.parallel.world import World, own_store

ROOT = Path(__file__).parents[3]
COLLECTIVES = str(Path("torch") / "distributed")
STATUS = 1
LAST_WAIT = 60.0  # seconds for a thread that waits for the store to come back from it


@dataclass
class Pulse:
    """Where the training thread is. `moved` is for whoever makes progress inside a long phase."""

    phase: str = "starting"
    entered: int = 0
    at: float = 0.0

    def enter(self, phase: str) -> None:
        """Begin another phase; every rank goes through the same ones."""
        self.phase, self.entered = phase, self.entered + 1
        self.moved()

    def moved(self) -> None:
        """There is progress."""
        self.at = time.monotonic()

    def seen(self, *_: object) -> None:
        """`moved`, as a hook of a module's forward."""
        self.moved()


@dataclass(frozen=True)
class Report:
    """What a rank tells of itself: `sent` counts its reports, `waits` is true inside of a collective."""

    sent: int
    phase: str
    entered: int
    place: str
    waits: bool
    host: str
    answers: bool = True

    def __str__(self) -> str:
        how = "" if self.answers else ", not answering (stopped, or its machine is)"
        return f"on {self.host}{how}, last seen {self.phase}{f' ({self.place})' if self.place else ''}"


UNSEEN = Report(0, "before its first report", -1, "", waits=False, host="an unknown host")


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of ours, and whether the thread is inside of a collective."""
    waits = False
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or COLLECTIVES in name
        if name.startswith(str(ROOT)) and "site-packages" not in name.removeprefix(str(ROOT)):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}", waits
        frame = frame.f_back
    return "", waits


def behind(reports: list[Report]) -> list[int]:
    """The ranks that the others wait for: those that do not answer, else those with fewer phases behind them, else
    those that are in no collective while others are. None where nothing tells them apart."""
    most = max(report.entered for report in reports)
    suspects = (
        [rank for rank, report in enumerate(reports) if not report.answers],
        [rank for rank, report in enumerate(reports) if report.entered < most],
        [rank for rank, report in enumerate(reports) if not report.waits],
    )
    return next((ranks for ranks in suspects if 0 < len(ranks) < len(reports)), [])


def verdict(reports: list[Report], timeout: float) -> str:
    """The one message."""
    blamed = behind(reports)
    waiting = [rank for rank in range(len(reports)) if rank not in blamed]
    what_next = (
        f"The run ends. Started again, it goes on from its last checkpoint; a step that takes longer than "
        f"{timeout:g} s needs a larger parallel.timeout."
    )
    if not blamed:
        return f"no rank has moved for {timeout:g} s: rank 0 {reports[0]}; nor have the others. {what_next}"
    named = "; ".join(f"rank {rank} {reports[rank]}" for rank in blamed)
    return f"waited {timeout:g} s for {named}. Rank {waiting[0]} waits {reports[waiting[0]].phase}. {what_next}"


class _Watch:
    """The thread of one rank."""

    def __init__(self, world: World, store: Store, pulse: Pulse, timeout: float) -> None:
        self.world, self.store, self.pulse, self.timeout = world, store, pulse, timeout
        self.every = min(1.0, timeout / 10)
        self.watched = threading.get_ident()
        self.sent = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._work, name="watching ranks", daemon=True)

    def _send(self) -> None:
        self.sent += 1
        frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
        place, waits = _place(frames.get(self.watched))
        phase, entered = self.pulse.phase, self.pulse.entered
        report = Report(self.sent, phase, entered, place, waits, socket.gethostname())
        self.store.set(f"watch/{self.world.rank}", json.dumps(asdict(report)))

    def _read(self) -> list[Report]:
        names = [f"watch/{rank}" for rank in range(self.world.size)]
        return [Report(**json.loads(self.store.get(name))) if self.store.check([name]) else UNSEEN for name in names]

    def _compared(self) -> list[Report]:
        """Two looks at all ranks: whoever has sent nothing between them does not answer."""
        before = self._read()
        self.ended.wait(3 * self.every)
        self._send()
        after = self._read()
        return [replace(now, answers=now.sent > then.sent) for then, now in zip(before, after, strict=True)]

    def _work(self) -> None:
        try:
            while not self.ended.wait(self.every):
                self._send()
                if time.monotonic() - self.pulse.at > self.timeout:
                    self._end(self._compared())
        except (RuntimeError, dist.DistError):
            return  # the store is gone, and with it torchrun, which ends this process

    def _end(self, reports: list[Report]) -> None:
        if self.ended.is_set() or time.monotonic() - self.pulse.at <= self.timeout:  # it moved while we looked
            return
        if self.store.add("watch/said", 1) == 1:
            print(f"\nerror: {verdict(reports, self.timeout)}", file=sys.stderr, flush=True)  # below the progress bar
        else:
            time.sleep(2.0)  # whoever speaks must not be ended by torchrun before it has spoken
        os._exit(STATUS)


@contextlib.contextmanager
def watched(world: World, timeout: float) -> Generator[Pulse]:
    """Watch the calling thread while the block runs. One process alone waits for nobody."""
    pulse = Pulse(at=time.monotonic())
    if world.size == 1:
        yield pulse
        return
    watch = _Watch(world, own_store(), pulse, timeout)
    watch.thread.start()
    try:
        yield pulse
    finally:
        watch.ended.set()
        # A thread that comes back from the store while Python ends aborts the process.
        watch.thread.join(min(timeout, LAST_WAIT))
