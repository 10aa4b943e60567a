"""Checkpoints that are complete or absent, and checked byte by byte before they are loaded.

    step_N.partial ─ every rank: its tensors, by DCP ─ hashes of all files ─ the first rank: rename ─► step_N

A checkpoint holds trained parameters and moments (`checkpoint_state.py`), the step, the rows read, and the run's
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
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, flock, read_json, sync_folder, write_json, write_text
from kd_core.json_fields import check_integer, check_number, check_object
from kd_core.parallel.collectives import all_gather_values, raise_on_all_ranks, run_on_all_ranks
from kd_core.parallel.world import World
from kd_core.students.student import Student
from kd_core.training.checkpoints.checkpoint_files import COMMON_FILES, HASHES, find_damage, hash_files
from kd_core.training.checkpoints.checkpoint_settings import Checkpoint
from kd_core.training.checkpoints.checkpoint_state import (  # fmt: skip
    State,
    check_frozen,
    empty_moments,
    frozen_norms,
    model_state,
    restore_moments,
    stored_names,
)
from kd_core.training.checkpoints.checkpoint_storage import TensorReader, TensorWriter, tensor_file

log = logging.getLogger("kd")
MOST_STEPS = 1 << 53
ANOTHER_ORDER = (
    "%s: rows came in an order of version %d, and come in one of version %d from here on. Records of this epoch may "
    "come twice or not at all. To keep the order, resume with the commit that the run's attempts/ name."
)
# DCP warns that a single process reads and writes alone, which is intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Progress:
    """The progress of a run: steps done, rows of the global order read, the checkpoint's metric, and steps skipped."""

    step: int = 0
    rows: int = 0
    metric: float | None = None
    skipped: int = 0
    order: int = 1  # version of the order of rows, 1 where a checkpoint does not name it


@dataclass(frozen=True)
class CheckpointContent:
    """The content of one checkpoint: tensors, progress, norms of frozen parameters, and the run's config.json."""

    state: State
    progress: Progress
    frozen: dict[str, float] = field(default_factory=dict)
    record: str = ""


@contextlib.contextmanager
def _as_usage_error(folder: Path, action: str, next_step: str) -> Generator[None]:
    """Raises a DCP failure as a `UsageError`. DCP's exception is no `Exception`, and has the cause in a dictionary."""
    try:
        with torch.no_grad():
            yield
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        reason = f"{type(failure).__name__} {failure}".strip().splitlines()[0]
        raise UsageError(f"{folder}: cannot be {action} ({reason}). {next_step}.") from None


def list_checkpoints(root: Path) -> list[Path]:
    """Returns all complete checkpoints in order, damaged or not."""
    return sorted(path for path in root.glob("step_*") if path.name[5:].isdigit())


def write(root: Path, content: CheckpointContent, world: World, group: dist.ProcessGroup | None) -> Path:
    """Writes `step_N`, all ranks together, and returns its folder once it is complete on disk.

    Raises:
        UsageError: it cannot be written. No folder of that name is left.
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
        common_files = [partial / name for name in COMMON_FILES]
        write_json(partial / HASHES, {**hashes, **hash_files(common_files)})
        # All bytes are on the disk before the rename makes the checkpoint visible.
        sync_folder(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_folder(root)

    run_on_all_ranks(world, begin, group)
    with _as_usage_error(partial, "written", "Free some space and run the same command again"):
        writer = TensorWriter(partial, world.rank)
        dcp_save(content.state, storage_writer=writer, process_group=group, no_dist=world.size == 1)
    by_rank = run_on_all_ranks(world, lambda: hash_files([tensor_file(partial, world.rank)]), group)
    run_on_all_ranks(world, lambda: end({name: facts for hashes in by_rank for name, facts in hashes.items()}), group)
    return folder


def newest_undamaged(root: Path, world: World, beat: Callable[[], None] = lambda: None) -> Path | None:
    """Returns the newest undamaged checkpoint, or None if none was ever written. Renames and logs damaged ones.

    Raises:
        UsageError: all checkpoints are damaged.
    """

    def put_aside(folder: Path, faults: list[str]) -> None:
        aside = folder.with_name(folder.name + ".damaged")
        log.error(
            "%s is damaged: %s. It is now %s, and the one before it is used.", folder, "; ".join(faults), aside.name
        )
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)

    while (folder := world.run_on_first(lambda: newest(root))) is not None:
        local_faults = find_damage(folder, slice(world.rank, None, world.size), beat)
        faults = list(
            dict.fromkeys(fault for rank_faults in all_gather_values(world, local_faults) for fault in rank_faults)
        )
        if not faults:
            return folder
        world.run_on_first(lambda folder=folder, faults=faults: put_aside(folder, faults))
    damaged = world.run_on_first(lambda: sorted(path.name for path in root.glob("step_*.damaged")))
    if damaged:
        names = ", ".join(damaged)
        raise_on_all_ranks(
            world,
            f"{root}: {names}, and no whole checkpoint is left. Restore one (without .damaged in its name), or delete "
            "the run's folder to start again.",
        )
    return None


@contextlib.contextmanager
def lock_for_reading(folder: Path) -> Generator[None]:
    """Holds a shared lock on a checkpoint, so that it is not deleted while it is read."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def delete(folder: Path) -> None:
    """Deletes a checkpoint unless it is in use. It is renamed first, so that no half of it keeps its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder.rename(folder.with_name(folder.name + ".partial")))
    except BlockingIOError:
        log.info("%s is being read, and kept for now", folder)
    finally:
        os.close(handle)


def _metric(folder: Path) -> float | None:
    """Returns a checkpoint's metric, or None if it is not finite or unreadable, which `newest_undamaged` reports."""
    try:
        metric = read_progress(folder).metric
    except UsageError:
        return None
    return None if metric is None or not math.isfinite(metric) else metric


def delete_superseded(root: Path, policy: Checkpoint) -> None:
    """Deletes all but the newest and the best checkpoints, and what a kill left half-written."""
    for partial in root.glob("step_*.partial"):
        shutil.rmtree(partial)
    for folder in sorted(
        set(list_checkpoints(root)[: -policy.keep_newest]) - {*checkpoints_by_metric(root, policy)[: policy.keep_best]}
    ):
        delete(folder)


def checkpoints_by_metric(root: Path, policy: Checkpoint) -> list[Path]:
    """Returns the checkpoints with a metric, the best first, and the oldest first among equals."""
    sign = 1 if policy.best_mode == "min" else -1
    scored = [(sign * metric, folder) for folder in list_checkpoints(root) if (metric := _metric(folder)) is not None]
    return [folder for _, folder in sorted(scored)]


def read_progress(folder: Path) -> Progress:
    """Reads the progress of a complete checkpoint."""
    path = folder / "progress.json"
    with damage_as_usage_error(path, "a checkpoint's progress"):
        stored = check_object({"order": 1, **read_json(path, "a checkpoint's progress")}, "it", vars(Progress()))
        metric = stored["metric"]
        if metric is not None and not (isinstance(metric, float) and not math.isfinite(metric)):
            metric = check_number(metric, "metric")
        counts = {
            name: check_integer(stored[name], name, 0, MOST_STEPS) for name in ("step", "rows", "skipped", "order")
        }
        return Progress(**counts, metric=metric)


def _read_norms(folder: Path) -> dict[str, float]:
    path = folder / "frozen.json"
    with damage_as_usage_error(path, "norms of what is not trained"):
        return {
            name: check_number(norm, name) for name, norm in read_json(path, "norms of what is not trained").items()
        }


def newest(root: Path) -> Path | None:
    """Returns the newest complete checkpoint, damaged or not."""
    return max(list_checkpoints(root), default=None)


def load(
    folder: Path, model: Student, optimizer: torch.optim.Optimizer | None = None, order: int | None = None
) -> Progress:
    """Restores `model`, and `optimizer` if there is one, in place. Each rank reads its own shards.

    Returns the progress, with a warning if rows are read in another `order` from here on.

    Raises:
        UsageError: the checkpoint cannot be read, or is of another student or another start.
    """
    progress, norms, reader = read_progress(folder), _read_norms(folder), TensorReader(folder)
    with _as_usage_error(folder, "read", "It belongs to another student, or to another version of this code"):
        state = model_state(model)
        if missing := sorted(stored_names(reader.metadata) ^ state.keys()):
            raise UsageError(f"{folder}: is of another student; {missing[0]!a} is not in both.")
        check_frozen(norms, frozen_norms(model))
        moments = empty_moments(model, reader.metadata) if optimizer else {}
        for name, tensors in moments.items():
            state.update({f"optimizer.{name}.{key}": tensor for key, tensor in tensors.items()})
        dcp_load(state, storage_reader=reader, no_dist=True)
    if optimizer:
        restore_moments(model, optimizer, moments)
    if order not in (None, progress.order):
        log.warning(ANOTHER_ORDER, folder, progress.order, order)
    return progress if order is None else replace(progress, order=order)


def load_model(folder: Path, model: Student, world: World | None = None) -> None:
    """Restores the parameters of `model` alone, after a check of every byte, which the ranks of `world` divide.

    Raises:
        UsageError: as in `load`, or the checkpoint is damaged.
    """
    world = world or World()
    with lock_for_reading(folder):
        local_faults = find_damage(folder, slice(world.rank, None, world.size))
        faults = list(
            dict.fromkeys(fault for rank_faults in all_gather_values(world, local_faults) for fault in rank_faults)
        )
        raise_on_all_ranks(
            world, f"{folder}: damaged: {'; '.join(faults)}. Use another checkpoint." if faults else None
        )
        load(folder, model)


def load_best(root: Path, policy: Checkpoint, model: Student, world: World) -> Path:
    """Restores the best checkpoint's parameters on all ranks, and returns its folder.

    Raises:
        UsageError: as in `load_model`, or no checkpoint has a value of the metric.
    """
    best = next(iter(world.run_on_first(lambda: checkpoints_by_metric(root, policy))), None)
    if best is None:
        raise_on_all_ranks(
            world,
            f"{root}: no checkpoint has a {policy.best_metric}, by which the best is known. Take the last: "
            "launchers.export_student --step=last.",
        )
        raise AssertionError
    load_model(best, model, world)
    return best
