"""Checkpoints that are complete or absent, and checked byte by byte before anything is taken from them.

    step_N.partial ─ every rank: its part, by DCP ─ hashes of all files ─ the first rank: rename ─► step_N

A checkpoint holds trained parameters and moments (`state.py`), the step, how far the data was read, and the run's
record. The schedule and the random state are functions of the step, so they are restored with it.
"""

import contextlib
import fcntl
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from kd_core.errors import UsageError
from kd_core.files import damaged, flock, read_json, sync_folder, write_json, write_text
from kd_core.json_fields import fields, integer, number
from kd_core.parallel.collectives import gathered, stop_alike, together
from kd_core.parallel.world import World
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, check_ranges
from kd_core.students.decoder.decoder import Decoder
from kd_core.training.checkpoints.checkpoint_files import HASHES, OWN_FILES, damage, described
from kd_core.training.checkpoints.checkpoint_state import (  # fmt: skip
    State,
    check_frozen,
    empty_moments,
    frozen_norms,
    model_state,
    put_back,
    stored_names,
)
from kd_core.training.checkpoints.checkpoint_storage import TensorReader, TensorWriter, file_of

log = logging.getLogger("kd")
MODES = ("min", "max")
MOST_STEPS = 1 << 53
# That one process reads and writes alone is what we mean where there is one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Checkpoint:
    """When to save, how, and what to keep.

    Args:
        every: so many steps; also after the last, and when the run is told to stop.
        asynchronous: training waits for a copy in memory alone, and a thread writes it. The bytes are the same.
        keep_newest: so many of the newest are kept; the one before the newest is for the day that it is damaged.
        keep_best: so many of the best are kept besides, of those whose step was validated.
        best_metric: what "best" means.
        best_mode: whether its smallest values are the best (min) or its largest (max).
        export: what `export/` is made of at the end: the last step, or the best checkpoint.
    """

    every: int = 10
    asynchronous: bool = True
    keep_newest: int = 2
    keep_best: int = 1
    best_metric: str = "val/loss"
    best_mode: str = "min"
    export: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        check_ranges(self, "checkpoint.", every=AT_LEAST_1, keep_newest=AT_LEAST_1, keep_best=AT_LEAST_0)
        if self.best_mode not in MODES:
            raise UsageError(f"checkpoint.best_mode: got {self.best_mode!r}; wanted one of {', '.join(MODES)}.")
        if self.export == "best" and not self.keep_best:
            raise UsageError(
                "checkpoint.export: got best, and checkpoint.keep_best=0 keeps none. Set checkpoint.keep_best=1, or "
                "checkpoint.export=last."
            )


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, rows of the global order that they took, the metric of the checkpoint, and
    how many of the steps did not move the student."""

    step: int = 0
    rows: int = 0
    metric: float | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Content:
    """What is written: tensors, progress, norms of what is not trained, and the run's config.json."""

    state: State
    progress: Progress
    frozen: dict[str, float] = field(default_factory=dict)
    record: str = ""


@contextlib.contextmanager
def _said_as_usage_error(folder: Path, what: str, then: str) -> Generator[None]:
    """DCP's own exception is no `Exception`, and hides the reason in a dictionary."""
    try:
        with torch.no_grad():
            yield
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        reason = f"{type(failure).__name__} {failure}".strip().splitlines()[0]
        raise UsageError(f"{folder}: cannot be {what} ({reason}). {then}.") from None


def kept(root: Path) -> list[Path]:
    """Returns all complete checkpoints in order, damaged or not."""
    return sorted(path for path in root.glob("step_*") if path.name[5:].isdigit())


def write(root: Path, content: Content, world: World, group: dist.ProcessGroup | None) -> Path:
    """Write `step_N`, all ranks together; on return it is complete on disk.

    Raises:
        UsageError: it cannot be written. Nothing is left under its name.
    """
    folder = root / f"step_{content.progress.step:08d}"
    partial = folder.with_name(folder.name + ".partial")

    def begin() -> None:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def end(hashes: dict[str, dict[str, int | str]]) -> None:
        if not world.is_first:
            return
        write_json(partial / "progress.json", vars(content.progress))
        write_json(partial / "frozen.json", content.frozen)
        write_text(partial / "config.json", content.record)
        own = [partial / name for name in OWN_FILES]
        write_json(partial / HASHES, {**hashes, **described(own)})
        sync_folder(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_folder(root)

    together(world, begin, group)
    with _said_as_usage_error(partial, "written", "Free some space and run the same again"):
        writer = TensorWriter(partial, world.rank)
        dcp_save(content.state, storage_writer=writer, process_group=group, no_dist=world.size == 1)
    parts = together(world, lambda: described([file_of(partial, world.rank)]), group)
    together(world, lambda: end({name: found for part in parts for name, found in part.items()}), group)
    return folder


def newest_whole(root: Path, world: World, beat: Callable[[], None] = lambda: None) -> Path | None:
    """The newest checkpoint without damage; None where none was ever written. Damaged ones are renamed, and named.

    Raises:
        UsageError: there are damaged ones, and none that is whole.
    """

    def put_aside(folder: Path, wrong: list[str]) -> None:
        aside = folder.with_name(folder.name + ".damaged")
        log.error("%s is damaged: %s. It is now %s; the one before it is taken.", folder, "; ".join(wrong), aside.name)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)

    while (folder := world.on_first(lambda: newest(root))) is not None:
        own = damage(folder, slice(world.rank, None, world.size), beat)
        wrong = list(dict.fromkeys(found for some in gathered(world, own) for found in some))
        if not wrong:
            return folder
        world.on_first(lambda folder=folder, wrong=wrong: put_aside(folder, wrong))
    damaged = world.on_first(lambda: sorted(path.name for path in root.glob("step_*.damaged")))
    if damaged:
        stop_alike(world, f"{root}: {', '.join(damaged)}, and no whole checkpoint is left. Restore one (without "
                   ".damaged in its name), or delete the run's folder to begin anew.")  # fmt: skip
    return None


@contextlib.contextmanager
def in_use(folder: Path) -> Generator[None]:
    """Keep a checkpoint from being deleted while it is read."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def delete(folder: Path) -> None:
    """By rename first, so that nothing half deleted is found under a checkpoint's name. Not if it is in use."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder.rename(folder.with_name(folder.name + ".partial")))
    except BlockingIOError:
        log.info("%s is being read, and kept for now", folder)
    finally:
        os.close(handle)


def _metric(folder: Path) -> float | None:
    """A checkpoint's metric; None where it is no number, or where `newest_whole` will say that nothing can be read."""
    try:
        metric = read_progress(folder).metric
    except UsageError:
        return None
    return None if metric is None or not math.isfinite(metric) else metric


def keep_some(root: Path, policy: Checkpoint) -> None:
    """Delete all but the newest and the best checkpoints, and what a kill left half-written."""
    for partial in root.glob("step_*.partial"):
        shutil.rmtree(partial)
    for folder in sorted(set(kept(root)[: -policy.keep_newest]) - {*best_first(root, policy)[: policy.keep_best]}):
        delete(folder)


def best_first(root: Path, policy: Checkpoint) -> list[Path]:
    """Returns the checkpoints with a metric, the best first; of equal ones the oldest."""
    sign = 1 if policy.best_mode == "min" else -1
    scored = [(sign * metric, folder) for folder in kept(root) if (metric := _metric(folder)) is not None]
    return [folder for _, folder in sorted(scored)]


def read_progress(folder: Path) -> Progress:
    """The progress that a complete checkpoint stands for."""
    path = folder / "progress.json"
    with damaged(path, "a checkpoint's progress"):
        found = fields(read_json(path, "a checkpoint's progress"), "it", vars(Progress()))
        metric = found["metric"]
        if metric is not None and not (isinstance(metric, float) and not math.isfinite(metric)):
            metric = number(metric, "metric")
        counts = {name: integer(found[name], name, 0, MOST_STEPS) for name in ("step", "rows", "skipped")}
        return Progress(**counts, metric=metric)


def _read_norms(folder: Path) -> dict[str, float]:
    """The norms of what was not trained."""
    path = folder / "frozen.json"
    with damaged(path, "norms of what is not trained"):
        return {name: number(norm, name) for name, norm in read_json(path, "norms of what is not trained").items()}


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint, damaged or not."""
    return max(kept(root), default=None)


def load(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Restore `model`, and `optimizer` where there is one, in place; each rank reads what it holds.

    Raises:
        UsageError: the checkpoint cannot be read, is of another student, or of one with another start.
    """
    progress, norms, reader = read_progress(folder), _read_norms(folder), TensorReader(folder)
    with _said_as_usage_error(folder, "read", "It is of another student, or of another version of this code"):
        state = model_state(model)
        if missing := sorted(stored_names(reader.metadata) ^ state.keys()):
            raise UsageError(f"{folder}: is of another student; {missing[0]!a} is not in both.")
        check_frozen(norms, frozen_norms(model))
        moments = empty_moments(model, reader.metadata) if optimizer else {}
        for name, tensors in moments.items():
            state.update({f"optimizer.{name}.{key}": tensor for key, tensor in tensors.items()})
        dcp_load(state, storage_reader=reader, no_dist=True)
    if optimizer:
        put_back(model, optimizer, moments)
    return progress


def load_model(folder: Path, model: Decoder, world: World | None = None) -> None:
    """Restore the parameters of `model` alone, after a look at every byte, which the ranks of `world` share.

    Raises:
        UsageError: as for `load`, or what is damaged.
    """
    world = world or World()
    with in_use(folder):
        own = damage(folder, slice(world.rank, None, world.size))
        wrong = list(dict.fromkeys(found for some in gathered(world, own) for found in some))
        stop_alike(world, f"{folder}: damaged: {'; '.join(wrong)}. Take another checkpoint." if wrong else None)
        load(folder, model)


def load_best(root: Path, policy: Checkpoint, model: Decoder, world: World) -> Path:
    """Restore the best checkpoint's parameters on all ranks; returns its folder.

    Raises:
        UsageError: as for `load_model`, or no checkpoint has a number of the metric.
    """
    best = next(iter(world.on_first(lambda: best_first(root, policy))), None)
    if best is None:
        stop_alike(world, f"{root}: no checkpoint has a {policy.best_metric}, by which the best is known. Take the "
                   "last: launchers.export_student --step=last.")  # fmt: skip
        raise AssertionError
    load_model(best, model, world)
    return best
