"""How long tests wait for what may hang: generous, and scaled by what this machine does when the tests start."""

import functools
import subprocess
import sys
import time

GENEROUS = 4.0
# Seconds of a fresh interpreter that imports numpy, on an idle core of an ordinary machine.
ORDINARY = 0.25


@functools.cache
def slowness() -> float:
    """Times as slow as an ordinary idle machine, at least 1: processes that start take most of the tests' time."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    return max(1.0, (time.monotonic() - started) / ORDINARY)


def patience(seconds: float) -> float:
    """Seconds after which what takes `seconds` at the most here is taken for a hang."""
    return GENEROUS * slowness() * seconds
