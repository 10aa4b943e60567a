"""The processes of a run: who am I, on which device, in which place of the mesh, and the few sums that ranks share."""

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

from kd_core.errors import EchoedError, RankError, UsageError
from kd_core.parallel.layout import Layout

R = TypeVar("R")
log = logging.getLogger("kd")
ALONE = Layout()
COLLECTIVE_TIMEOUT = 600.0


@dataclass(frozen=True)
class World:
    """This process among those of a run. A world of one needs no process group.

    Until it is laid out, every rank has the whole student and reads rows of its own. Laid out, `mesh` has the
    dimensions dp_replicate, dp_shard and tp; ranks of one tensor-parallel group read the same rows.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    layout: Layout = ALONE
    mesh: DeviceMesh | None = None

    def laid_out(self, layout: Layout) -> Self:
        """The same processes as a mesh; one process stays as it is."""
        assert layout.size == self.size
        if self.size == 1:
            return self
        sizes, names = (layout.replicas, layout.shards, layout.tensor), ("dp_replicate", "dp_shard", "tp")
        mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it warns of gathers at an export
        if layout.tensor > 1:
            # A norm over both is then one reduction, the same on every rank, instead of two in some order.
            mesh["dp_shard", "tp"]._flatten("dp_shard_tp")  # pyright: ignore[reportPrivateUsage] (it has no other name)
        # Torch's caches keep meshes for ever. One that finds its groups by name keeps none of them alive.
        getattr(mesh, "_pg_registry", {}).clear()
        return replace(self, layout=layout, mesh=mesh)

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes files and speaks."""
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        """Which part of the tensors this rank has."""
        return self.rank % self.layout.tensor

    @property
    def dp_rank(self) -> int:
        """Which rows this rank reads, of `dp_size`."""
        return self.rank // self.layout.tensor

    @property
    def dp_size(self) -> int:
        """How many ranks read different rows."""
        return self.size // self.layout.tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of ranks that read different rows, in place; every rank has the same sum."""
        if self.tp_rank > 0:
            tensor.zero_()
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_floats(self, values: dict[str, float]) -> dict[str, float]:
        """Add up one number a name, in float64, as `sum_` does; every rank has the same names."""
        names = sorted(values)
        total = self.sum_(torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device))
        return dict(zip(names, total.tolist(), strict=True))

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def on_first(self, work: Callable[[], R]) -> R:
        """Run `work` on the first rank; every rank gets its result, or stops with its error."""
        box: list[object] = [None, None]
        if self.is_first:
            try:
                box[0] = work()
            except (UsageError, OSError) as error:
                box[1] = error
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        if isinstance(box[1], Exception):
            raise box[1] if self.is_first else EchoedError(str(box[1]))
        return box[0]  # pyright: ignore[reportReturnType]


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may use; all, where the system binds no process to cores."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _die_with_launcher() -> None:
    """Have the kernel end this rank when torchrun dies: it starts ranks in sessions of their own, so a torchrun that
    is killed would leave them training, owning the run's folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)


def _store() -> Store:
    """Where ranks meet. After an elastic restart torchrun offers the same store again, with keys of the dead ranks in
    it; each attempt has its own names there.
    """
    store, _, _ = next(iter(rendezvous("env://")))
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def own_store() -> Store:
    """Another connection to the store where ranks met, for a thread of its own."""
    return _get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]


def _end_groups(error: BaseException | None) -> None:
    """Destroy all process groups and join gloo's threads, which end only when nothing refers to their group.

    Gloo wakes whoever waits for a collective before it frees the tensors, and to free them it takes the GIL. A thread
    that does so while the interpreter ends aborts the process, however well the run has ended.
    """
    errors, cleared = [error], set[int]()
    while errors:  # the frames that they came through hold students, and those hold groups
        each = errors.pop()
        if each is not None and id(each) not in cleared:
            cleared.add(id(each))
            traceback.clear_frames(each.__traceback__)
            errors += [each.__cause__, each.__context__]
    try:
        dist.destroy_process_group()
    except RuntimeError:
        if error is None:
            raise
        log.exception("process groups could not be destroyed after %r", error)
    gc.collect()  # sharded students are reference cycles


def _number(name: str, alone: int) -> int:
    """Reads a variable of torchrun; a process without it is `alone`."""
    text = os.environ.get(name, str(alone))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < alone:
        raise UsageError(f"{name}: got {text!a:.80} in the environment; wanted a number from {alone} on, of torchrun.")
    return int(text)


@contextlib.contextmanager
def joined_world(timeout: float = COLLECTIVE_TIMEOUT) -> Generator[World]:
    """Join the processes that torchrun started (or stand alone), and share this machine's cores between them.

    `timeout`: seconds after which a collective that a rank does not come to is an error.
    """
    _die_with_launcher()
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    local_size, local_rank = _number("LOCAL_WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    torch.set_num_threads(max(1, len(usable_cores()) // local_size))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=_store(), rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
    )
    try:
        yield World(rank, size, device)
    except UsageError as error:
        alone = rank > 0 and not isinstance(error, EchoedError)
        if alone:
            raise RankError(f"rank {rank}: {error}") from error
        raise
    finally:
        _end_groups(sys.exception())
