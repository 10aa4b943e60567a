"""When a run stops before its last step, and is saved: it was told to, or its time is over. All ranks stop alike."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from kd_core.errors import UsageError
from kd_core.parallel.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIME_IS_OVER = 1_000  # above every signal's number
UNITS = (1, 60, 3_600, 86_400)


def _in_seconds(parts: Sequence[float]) -> float:
    """Return the sum of days, hours, minutes and seconds, of which the first ones may be absent."""
    return sum(part * unit for part, unit in zip(reversed(parts), UNITS, strict=False))


def seconds_of(text: str) -> float:
    """A time as DD:HH:MM:SS, HH:MM:SS, MM:SS or seconds.

    Raises:
        UsageError: it is none of these, or not more than 0.
    """
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if not 0 < len(parts) <= len(UNITS) or min(parts) < 0 or not 0 < sum(parts) < float("inf"):
        raise UsageError(f"got the time {text!r}; wanted DD:HH:MM:SS, HH:MM:SS or seconds, more than 0.")
    return _in_seconds(parts)


def _age_by_ps(process: int) -> float:
    """Return the seconds since a process began, in whole ones, as every POSIX system tells them."""
    command = ["ps", "-o", "etime=", "-p", str(process)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _in_seconds([float(part) for part in re.split("[-:]", shown)])  # DD-HH:MM:SS


def age(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds since the command began: this process, or the torchrun that restarts it when a rank dies."""
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in environment else os.getpid()
    if sys.platform != "linux":
        return _age_by_ps(process)
    started = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])  # see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


class Stopping:
    """Hears signals from the moment it is entered. A second Ctrl-C interrupts at once."""

    def __init__(self, max_seconds: float | None = None) -> None:
        """`max_seconds` counts from the start of the command."""
        self.deadline = None if max_seconds is None else time.monotonic() - age() + max_seconds
        self.heard = 0
        self.before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self.before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.heard == signal.SIGINT:
            raise KeyboardInterrupt
        self.heard = number

    def _own(self) -> int:
        over = self.deadline is not None and time.monotonic() > self.deadline
        return self.heard or (TIME_IS_OVER if over else 0)

    def agreed(self, world: World) -> str | None:
        """Why all ranks stop now, if any of them has heard a signal or has no time left."""
        code = torch.tensor([self._own()])
        if world.size > 1:
            dist.all_reduce(code, dist.ReduceOp.MAX)
        number = int(code)
        if not number:
            return None
        return "its time is over" if number == TIME_IS_OVER else f"told to by {signal.Signals(number).name}"
