"""A bound on the memory that reading somebody else's file may take, on Linux; elsewhere there is none."""

import contextlib
import resource
from collections.abc import Generator
from pathlib import Path

STATM = Path("/proc/self/statm")


@contextlib.contextmanager
def bounded_memory(most: int) -> Generator[None]:
    """Let this process have `most` bytes more than it has now; allocations beyond raise MemoryError."""
    if not STATM.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(STATM.read_text().split()[0]) * resource.getpagesize()
    limits = [each for each in (soft, hard, now + most) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
