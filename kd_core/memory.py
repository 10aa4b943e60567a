"""A bound on the memory that reading an untrusted file may take. It holds on Linux, and does nothing elsewhere."""

import contextlib
import resource
from collections.abc import Generator
from pathlib import Path

STATM = Path("/proc/self/statm")


@contextlib.contextmanager
def bounded_memory(most: int) -> Generator[None]:
    """Limits this process to `most` bytes more than it has now. Allocations beyond that raise MemoryError."""
    if not STATM.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(STATM.read_text().split()[0]) * resource.getpagesize()
    limits = [limit for limit in (soft, hard, now + most) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
