"""A watchdog that ends a hung run with one message: which rank did not arrive, and where it was.

    training thread ─ Pulse ─► watch thread of the rank ─ Report ─► store ─► reports of all ranks ─► message, exit

The training thread records its phase and its progress in a `Pulse`. The watch thread reports them to the other ranks
through the store. If there is no progress for the timeout, it compares the reports of all ranks, prints which of them
are behind, and ends the process. Dead ranks, as opposed to hung ones, are detected by torchrun.
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

from kd_core.parallel import transfers
from kd_core.parallel.world import World, connect_store

ROOT = Path(__file__).parents[3]
COLLECTIVES = str(Path("torch") / "distributed")
# A GPU's collectives run behind the host, which waits for them where it reads numbers.
READS = transfers.__file__
STATUS = 1
LAST_WAIT = 60.0  # seconds in which the watch thread must return from a call to the store


@dataclass
class Pulse:
    """The training thread's phase, how many phases it has entered, and the time of its last progress."""

    phase: str = "starting"
    entered: int = 0
    last_progress: float = 0.0

    def enter(self, phase: str) -> None:
        """Begins another phase. Every rank goes through the same phases."""
        self.phase, self.entered = phase, self.entered + 1
        self.beat()

    def beat(self) -> None:
        """Records progress inside a phase, which a long phase must do to not be taken for a hang."""
        self.last_progress = time.monotonic()

    def on_forward(self, *_: object) -> None:
        """Records progress, as a forward hook of a module."""
        self.beat()


@dataclass(frozen=True)
class RankReport:
    """The state of one rank. `sent` counts its reports, and `waits` is true inside of a collective."""

    sent: int
    phase: str
    entered: int
    place: str
    waits: bool
    host: str
    answers: bool = True

    def __str__(self) -> str:
        silence = "" if self.answers else ", not answering (stopped, or its machine is)"
        return f"on {self.host}{silence}, last seen {self.phase}{f' ({self.place})' if self.place else ''}"


UNSEEN = RankReport(0, "before its first report", -1, "", waits=False, host="an unknown host")


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Returns `FILE:LINE` of the innermost frame in this project, and whether the thread is inside of a collective.

    A thread that reads numbers from a GPU counts as one that is.
    """
    waits = False
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or COLLECTIVES in name or name == READS
        if name.startswith(str(ROOT)) and "site-packages" not in name.removeprefix(str(ROOT)):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}", waits
        frame = frame.f_back
    return "", waits


def ranks_behind(reports: list[RankReport]) -> list[int]:
    """Returns the ranks that the other ranks wait for, or none if nothing tells ranks apart.

    They are the ranks that send no reports. Failing these, they are the ranks that have entered fewer phases, or the
    ranks outside of any collective.
    """
    latest = max(report.entered for report in reports)
    suspects = (
        [rank for rank, report in enumerate(reports) if not report.answers],
        [rank for rank, report in enumerate(reports) if report.entered < latest],
        [rank for rank, report in enumerate(reports) if not report.waits],
    )
    return next((ranks for ranks in suspects if 0 < len(ranks) < len(reports)), [])


def hang_message(reports: list[RankReport], timeout: float) -> str:
    """Returns the message that ends the run."""
    blamed = ranks_behind(reports)
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
    """The watch thread of one rank."""

    def __init__(self, world: World, store: Store, pulse: Pulse, timeout: float) -> None:
        self.world, self.store, self.pulse, self.timeout = world, store, pulse, timeout
        self.every = min(1.0, timeout / 10)
        self.watched = threading.get_ident()
        self.sent = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watching ranks", daemon=True)

    def _send(self) -> None:
        self.sent += 1
        frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
        place, waits = _place(frames.get(self.watched))
        phase, entered = self.pulse.phase, self.pulse.entered
        report = RankReport(self.sent, phase, entered, place, waits, socket.gethostname())
        self.store.set(f"watch/{self.world.rank}", json.dumps(asdict(report)))

    def _read(self) -> list[RankReport]:
        names = [f"watch/{rank}" for rank in range(self.world.size)]
        return [
            RankReport(**json.loads(self.store.get(name))) if self.store.check([name]) else UNSEEN for name in names
        ]

    def _compare(self) -> list[RankReport]:
        """Reads the reports of all ranks twice. A rank that sends none in between does not answer.

        Ranks compare at the same time, so each must go on sending while it does.
        """
        before = self._read()
        for _ in range(3):
            self.ended.wait(self.every)
            self._send()
        after = self._read()
        return [replace(now, answers=now.sent > then.sent) for then, now in zip(before, after, strict=True)]

    def _run(self) -> None:
        try:
            while not self.ended.wait(self.every):
                self._send()
                if time.monotonic() - self.pulse.last_progress > self.timeout:
                    self._end(self._compare())
        except (RuntimeError, dist.DistError):
            return  # the store is gone, and with it torchrun, which ends this process

    def _end(self, reports: list[RankReport]) -> None:
        # The training thread may have made progress while the reports were compared.
        if self.ended.is_set() or time.monotonic() - self.pulse.last_progress <= self.timeout:
            return
        # The first rank to get here prints the message.
        if self.store.add("watch/said", 1) == 1:
            print(
                f"\nerror: {hang_message(reports, self.timeout)}", file=sys.stderr, flush=True
            )  # below the progress bar
        else:
            time.sleep(2.0)  # torchrun ends all ranks once one has exited: leave the first rank the time to print
        os._exit(STATUS)


@contextlib.contextmanager
def watch_for_hangs(world: World, timeout: float) -> Generator[Pulse]:
    """Watches the calling thread while the block runs, and yields the `Pulse` that it must keep up to date.

    A single process cannot wait for other ranks, so it is not watched.
    """
    pulse = Pulse(last_progress=time.monotonic())
    if world.size == 1:
        yield pulse
        return
    watch = _Watch(world, connect_store(), pulse, timeout)
    watch.thread.start()
    try:
        yield pulse
    finally:
        watch.ended.set()
        # A thread that returns from the store while Python shuts down would abort the process.
        watch.thread.join(min(timeout, LAST_WAIT))
