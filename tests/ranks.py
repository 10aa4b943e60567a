"""A function on several processes at once, joined by gloo: `function(world, *args)`; any rank's error is the test's.

A process takes three seconds to start, so a test does much in one call.
"""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kd_core.parallel.mesh import World

TIMEOUT = datetime.timedelta(seconds=60)


def _rank(rank: int, size: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    function(World(rank, size), *args)
    dist.barrier()  # a process that leaves while another still reads from it makes gloo abort
    dist.destroy_process_group()


def run_ranks(size: int, function: Callable[..., None], *args: Any) -> None:
    """`function` must be importable, its arguments picklable."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(_rank, (size, store, function, args), nprocs=size)
