"""A function on several processes joined by gloo: `function(world, *args)`, and any rank's error is the test's."""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kd_core.parallel.world import World
from tests.forks import CORES, bind, start_server
from tests.patience import patience


def _rank(rank: int, cores: list[int], group: dict[str, Any], function: Callable[..., None], args: Any) -> None:
    bind(cores, rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, **group)
    function(World(rank, group["world_size"]), *args)
    dist.barrier()  # a process that leaves while another still reads from it makes gloo abort
    dist.destroy_process_group()


def run_ranks(size: int, function: Callable[..., None], *args: Any) -> None:
    """`function` must be importable, its arguments picklable."""
    with tempfile.TemporaryDirectory() as folder:
        timeout = datetime.timedelta(seconds=patience(60))
        group = {"init_method": f"file://{Path(folder) / 'store'}", "world_size": size, "timeout": timeout}
        arguments = (CORES, group, function, args)
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=size, start_method=start_server())
