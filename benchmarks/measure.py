"""Time side by side in one process; peak memory each in its own."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.inputs import Inputs, Point, Step, make_inputs

WARM_UP = Point(16, 512, 32, 4)


class Seen(NamedTuple):
    """Median seconds of forward and backward, and MiB at the peak over the inputs."""

    seconds: float
    mib: float | None = None


def once(step: Step, given: Inputs, precision: str) -> float:
    """Seconds of one forward and backward pass; the device has finished before and after."""
    given.hidden.grad = given.weight.grad = None
    device = given.hidden.device
    _wait(device)
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
        loss = step(given)
    if loss.requires_grad:
        loss.backward()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Times(NamedTuple):
    """Median seconds by name; the names that ran once only, because they are slow; what became of those that failed."""

    seconds: dict[str, float]
    slow: set[str]
    failed: dict[str, str]


def times(point: Point, precision: str, steps: dict[str, Step], rounds: int, device: str, limit: float) -> Times:
    """Every round runs each candidate once, in turn, so that a slow minute of the machine hits all.

    Each round begins with another one, so that none always follows the same neighbour. Whoever takes `limit` times
    as long as the first candidate in a first pass keeps that pass's time and enters no round.
    """
    given, found = make_inputs(point, precision, device), Times({}, set(), {})
    small, seen = make_inputs(WARM_UP, precision, device), dict[str, list[float]]()
    for name, step in steps.items():
        try:
            once(step, small, precision)
            first = once(step, given, precision)
        except (RuntimeError, NotImplementedError) as error:
            found.failed[name] = str(error).splitlines()[0][:80]
            continue
        base = found.seconds.setdefault(next(iter(steps)), first)
        found.seconds[name] = first
        if first > limit * base:
            found.slow.add(name)
        else:
            seen[name] = []
    for turn in range(rounds):
        names = list(seen)
        start = turn * 7 % max(1, len(names))
        for name in names[start:] + names[:start]:
            seen[name].append(once(steps[name], given, precision))
    found.seconds.update({name: median(values) for name, values in seen.items()})
    return found


def peak_mib(point: Point, precision: str, step: Step, device: str) -> float:
    """Growth of this process's peak over the inputs; meant for a process that does nothing else.

    A first pass on a few positions loads what is loaded at first use (modules, kernels), which is no one's buffer.
    """
    once(step, make_inputs(WARM_UP, precision, device), precision)
    given = make_inputs(point, precision, device)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(step, given, precision)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
    once(step, given, precision)
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(field: str) -> int:
    """VmRSS is what is resident now, VmHWM the most that was (since `clear_refs`), by Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def peak_mib_of_a_child(arguments: list[str], name: str) -> float | None:
    """`peak_mib` of one candidate by a process of its own; None where it fails (the reason goes to stderr)."""
    command = [sys.executable, "-m", "benchmarks.losses", *arguments, f"--child={name}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: no peak memory: {done.stderr.strip()[-200:]}", file=sys.stderr)
        return None
    return float(done.stdout)
