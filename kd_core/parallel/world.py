"""The processes of a run: rank, device and place in the mesh of this process, and sums over ranks."""

import contextlib
import ctypes
import datetime
import gc
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # pyright: ignore[reportUnusedImport] (imported later, its defaults would hold a group)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import (
    PrefixStore,
    Store,
    _get_default_store,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.rendezvous import rendezvous

from kd_core.errors import RankError, RemoteError, UsageError
from kd_core.parallel.layout import Layout
from kd_core.row_shares import RowShare

R = TypeVar("R")
log = logging.getLogger("kd")
SINGLE_RANK = Layout()
COLLECTIVE_TIMEOUT = 600.0


@dataclass(frozen=True)
class World:
    """This process among those of a run. A world of one needs no process group.

    Before `with_layout`, every rank has the whole student and reads rows of its own. After it, `mesh` has the
    dimensions dp_replicate, dp_shard and tp, and the ranks of one tensor-parallel group read the same rows. Ranks that
    divide their rows by position are a group of `row_mesh`. In `mesh` they are data-parallel ranks.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    layout: Layout = SINGLE_RANK
    mesh: DeviceMesh | None = None
    row_mesh: DeviceMesh | None = None
    local_rank: int = 0  # among the processes of its host

    def with_layout(self, layout: Layout) -> Self:
        """Returns a world of the same processes with a mesh, or this world where it has one process."""
        assert layout.size == self.size
        if self.size == 1:
            return self
        sizes, names = (layout.replicas, layout.shards, layout.tensor), ("dp_replicate", "dp_shard", "tp")
        mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it warns of every gather of an export
        if layout.tensor > 1:
            # Flatten both dimensions, so that a norm over them is one reduction with the same result on every rank,
            # instead of two reductions in some order.
            mesh["dp_shard", "tp"]._flatten("dp_shard_tp")  # pyright: ignore[reportPrivateUsage] (it has no other name)
        # Neighbours of one tensor-parallel position.  [size / context, context]
        ranks = torch.arange(self.size).view(-1, layout.context, layout.tensor).mT.reshape(-1, layout.context)
        row_mesh = None
        if layout.context > 1:
            row_mesh = DeviceMesh(self.device.type, ranks, mesh_dim_names=("rows", "cp"))["cp"]
        # torch caches meshes for ever. Without this registry, a mesh looks its groups up by name and keeps none alive.
        for made in (mesh, row_mesh):
            getattr(made, "_pg_registry", {}).clear()
        return replace(self, layout=layout, mesh=mesh, row_mesh=row_mesh)

    @property
    def is_first(self) -> bool:
        """Returns True on the one rank that writes files and logs."""
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        """Returns this rank's position in its tensor-parallel group, which selects its part of the tensors."""
        return self.rank % self.layout.tensor

    @property
    def dp_rank(self) -> int:
        """Returns this rank's data-parallel position, 0 to `dp_size` − 1, which selects the rows that it reads."""
        return self.rank // (self.layout.tensor * self.layout.context)

    @property
    def dp_size(self) -> int:
        """Counts the ranks that read different rows."""
        return self.size // (self.layout.tensor * self.layout.context)

    @property
    def row_share(self) -> RowShare:
        """Returns which positions of those rows this rank has."""
        context = self.layout.context
        return RowShare(self.rank // self.layout.tensor % context, context, self.row_mesh)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up the tensors of ranks with different positions, in place, with the same result on every rank."""
        # Ranks of one tensor-parallel group have the same positions: only the first of them counts.
        if self.tp_rank > 0:
            tensor.zero_()
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_floats(self, values: dict[str, float]) -> dict[str, float]:
        """Adds up one number for each name over ranks, in float64, as `sum_` does. All ranks need the same names.

        The numbers are on the host and stay there, so that no rank waits for its device.
        """
        names = sorted(values)
        total = self.sum_(torch.tensor([values[name] for name in names], dtype=torch.float64))
        return dict(zip(names, total.tolist(), strict=True))

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier()

    def run_on_first(self, work: Callable[[], R]) -> R:
        """Runs `work` on the first rank and returns its result, or raises its error, on every rank."""
        outcome: list[object] = [None, None]  # result, error
        if self.is_first:
            try:
                outcome[0] = work()
            except (UsageError, OSError) as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[1], Exception):
            raise outcome[1] if self.is_first else RemoteError(str(outcome[1]))
        return outcome[0]  # pyright: ignore[reportReturnType]


def usable_cores() -> list[int]:
    """Returns the numbers of the cores that this process may use: all, where the system has no core affinity."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _die_with_launcher() -> None:
    """Asks the kernel to end this rank when torchrun dies.

    torchrun starts ranks in sessions of their own. Without this, ranks of a killed torchrun would train on and own
    the run's folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)


def _rendezvous_store() -> Store:
    """Returns the store of the rendezvous, with a key prefix for each attempt.

    After an elastic restart torchrun offers the same store again, which still holds keys of the dead ranks.
    """
    store, _, _ = next(iter(rendezvous("env://")))
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def connect_store() -> Store:
    """Opens another connection to the store of the rendezvous, for use by one thread."""
    return _get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]


def _end_groups(error: BaseException | None) -> None:
    """Destroys all process groups and joins gloo's threads, which end only when nothing refers to their group.

    A gloo thread wakes waiters of a collective before it frees the tensors, and it needs the GIL to free them. If
    that happens while the interpreter ends, the process aborts, even after a successful run.
    """
    errors, cleared = [error], set[int]()
    while errors:  # frames of their tracebacks refer to students, and students refer to groups
        cause = errors.pop()
        if cause is not None and id(cause) not in cleared:
            cleared.add(id(cause))
            traceback.clear_frames(cause.__traceback__)
            errors += [cause.__cause__, cause.__context__]
    try:
        dist.destroy_process_group()
    except RuntimeError:
        if error is None:
            raise
        log.exception("process groups could not be destroyed after %r", error)
    gc.collect()  # sharded students are reference cycles


def _read_number(name: str, default: int) -> int:
    """Returns the number in an environment variable of torchrun, or `default`, which is also the smallest valid one."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < default:
        raise UsageError(
            f"{name}: got {text!a:.80} in the environment; wanted a number from {default} on, of torchrun."
        )
    return int(text)


def _device_of(local_rank: int) -> torch.device:
    """Returns the GPU of a rank of this machine, or the CPU if it has no GPU.

    Some launchers show each rank one GPU, by CUDA_VISIBLE_DEVICES. It is number 0 for each of them.

    Raises:
        UsageError: the machine has fewer GPUs than ranks. NCCL refuses two ranks on one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if gpus == 1 and visible and "," not in visible:
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise UsageError(
            f"LOCAL_RANK: got {local_rank}; this machine has {gpus} GPU{'s' if gpus > 1 else ''}, and every rank needs "
            f"one of its own. Start torchrun with --nproc-per-node={gpus}."
        )
    return torch.device("cuda", local_rank)


def use_device(device: torch.device) -> None:
    """Makes a GPU the one that this thread works on. Threads begin with GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention makes a plan for each new length of a document, which takes longer than a step. Its backward
        # pass is not deterministic either.
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def joined_world(timeout: float = COLLECTIVE_TIMEOUT) -> Generator[World]:
    """Joins the processes that torchrun started, if it did, and divides this machine's cores among them.

    Args:
        timeout: seconds after which a collective fails that some rank does not reach.

    Raises:
        UsageError: a variable of torchrun is no number in range, or this rank has no GPU where others have one.
        RankError: this rank, not the first, ended with a `UsageError` that no other rank reports.
    """
    _die_with_launcher()
    size, rank = _read_number("WORLD_SIZE", 1), _read_number("RANK", 0)
    local_size, local_rank = _read_number("LOCAL_WORLD_SIZE", 1), _read_number("LOCAL_RANK", 0)
    torch.set_num_threads(max(1, len(usable_cores()) // local_size))
    device = _device_of(local_rank)
    use_device(device)
    if size == 1:
        yield World(device=device)
        return
    # With its device, NCCL connects at once, and makes the groups of a mesh by splitting this one. gloo's groups are
    # then split too.
    backend, device_id = ("cuda:nccl,cpu:gloo", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, store=_rendezvous_store(), rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout),
        device_id=device_id,
    )  # fmt: skip
    try:
        yield World(rank, size, device, local_rank=local_rank)
    except UsageError as error:
        is_unreported = rank > 0 and not isinstance(error, RemoteError)
        if is_unreported:
            raise RankError(f"rank {rank}: {error}") from error
        raise
    finally:
        _end_groups(sys.exception())
