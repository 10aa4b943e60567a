"""Early stops of a run, by a signal or a time limit. All ranks stop after the same step, and the run is saved."""

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
TIME_IS_OVER, NO_DATA = 1_000, 1_001  # above every signal's number
REASONS = {TIME_IS_OVER: "its time is over", NO_DATA: "a rank lacks the data of the next step"}
UNITS = (1, 60, 3_600, 86_400)


def _in_seconds(parts: Sequence[float]) -> float:
    """Returns the sum of days, hours, minutes and seconds, of which the first ones may be absent."""
    return sum(part * unit for part, unit in zip(reversed(parts), UNITS, strict=False))


def parse_seconds(text: str) -> float:
    """Parses a time as DD:HH:MM:SS, HH:MM:SS, MM:SS or seconds, and returns it in seconds.

    Raises:
        UsageError: the text is none of these, or not more than 0.
    """
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if not 0 < len(parts) <= len(UNITS) or min(parts) < 0 or not 0 < sum(parts) < float("inf"):
        raise UsageError(f"got the time {text!r}; wanted DD:HH:MM:SS, HH:MM:SS or seconds, more than 0.")
    return _in_seconds(parts)


def _age_by_ps(process: int) -> float:
    """Returns the seconds since a process began, rounded to whole seconds, by the `ps` of any POSIX system."""
    command = ["ps", "-o", "etime=", "-p", str(process)]
    elapsed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _in_seconds([float(part) for part in re.split("[-:]", elapsed)])  # DD-HH:MM:SS


def command_age(environment: Mapping[str, str] = os.environ) -> float:
    """Returns the seconds since the command began: this process, or the torchrun that restarts it if a rank dies."""
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in environment else os.getpid()
    if sys.platform != "linux":
        return _age_by_ps(process)
    # Field 22 of /proc/PID/stat, the start time in clock ticks since boot: proc(5).
    started = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


class StopSignals:
    """Handlers of the stop signals while the context is entered, and the time limit of a run.

    `max_seconds` counts from the start of the command. A second Ctrl-C interrupts at once.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self.deadline = None if max_seconds is None else time.monotonic() - command_age() + max_seconds
        self.received = 0  # the number of the last signal
        self.previous_handlers: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self.previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def local_code(self) -> int:
        """Returns this rank's reason to stop as a number, or 0. It never falls back to 0."""
        is_over = self.deadline is not None and time.monotonic() > self.deadline
        return self.received or (TIME_IS_OVER if is_over else 0)

    def agree_on_stop(self, world: World, has_data: bool = True) -> str | None:
        """Returns why all ranks stop now, or None if no rank has received a signal, run out of time, or lacks data.

        All ranks call it together, after every step.
        """
        # The largest code of all ranks: missing data come before a time limit, and that before any signal.
        code = torch.tensor([self.local_code() if has_data else NO_DATA])
        if world.size > 1:
            dist.all_reduce(code, dist.ReduceOp.MAX)
        number = int(code)
        if not number:
            return None
        return REASONS.get(number) or f"told to by {signal.Signals(number).name}"
