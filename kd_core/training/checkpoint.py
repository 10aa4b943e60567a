"""Checkpoints that are complete or absent: written by DCP into `step_N.partial`, renamed when whole.

Holds parameters, optimiser moments, the step, and how far the data was read. The schedule and the random state
are functions of the step (`schedule.py`, `loop.py`), so they are restored with it.
"""

import contextlib
import shutil
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from kd_core.errors import UsageError
from kd_core.files import new_folder, read_json, write_json
from kd_core.parallel.mesh import World
from kd_core.students.decoder import Decoder


@dataclass(frozen=True)
class Checkpoint:
    """When to save (every `every` steps and at the end), and how many to keep: the newest, and the best."""

    every: int = 10
    keep_newest: int = 1
    keep_best: int = 1
    best_metric: str = "val/loss"

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_newest < 1 or self.keep_best < 0:
            raise UsageError("checkpoint: wanted every ≥ 1, keep_newest ≥ 1 and keep_best ≥ 0.")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, rows of the global order that they took, and the metric of the checkpoint."""

    step: int = 0
    rows: int = 0
    metric: float | None = None


@contextlib.contextmanager
def _one_process() -> Generator[None]:
    """DCP warns that no process group exists; that one process reads and writes is what we mean."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _said_as_usage_error(folder: Path, what: str, then: str) -> Generator[None]:
    """DCP's own exception is no `Exception`, and hides the reason in a dictionary."""
    try:
        yield
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        reason = f"{type(failure).__name__} {failure}".strip().splitlines()[0]
        raise UsageError(f"{folder}: cannot be {what} ({reason}). {then}.") from None


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step_*") if path.name[5:].isdigit())


def _state(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": dict(model.named_parameters()), "optimizer": get_optimizer_state_dict(model, optimizer)}


def save(root: Path, progress: Progress, model: Decoder, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Write `step_N`; on return it is complete on disk. The first rank writes, for every rank holds the same."""

    def write() -> None:
        with new_folder(root / f"step_{progress.step:08d}") as partial:
            with _one_process(), _said_as_usage_error(partial, "written", "Free some space and run the same again"):
                dcp_save(_state(model, optimizer), checkpoint_id=partial, no_dist=True)
            write_json(partial / "progress.json", vars(progress))

    world.on_first(write)


def keep_some(root: Path, policy: Checkpoint) -> None:
    """Delete all but the newest and the best checkpoints, and what a kill left half-written."""
    for partial in root.glob("step_*.partial"):
        shutil.rmtree(partial)
    folders = _folders(root)
    scored = [(read_progress(folder).metric, folder) for folder in folders]
    best = sorted((metric, folder) for metric, folder in scored if metric is not None)[: policy.keep_best]
    for folder in set(folders[: -policy.keep_newest]) - {folder for _, folder in best}:
        shutil.rmtree(folder)


def read_progress(folder: Path) -> Progress:
    """The progress that a complete checkpoint stands for."""
    return Progress(**read_json(folder / "progress.json", "a checkpoint's progress"))


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint."""
    folders = _folders(root)
    return folders[-1] if folders else None


def newest_progress(root: Path) -> Progress:
    """How far the newest complete checkpoint is; the start where there is none."""
    folder = newest(root)
    return read_progress(folder) if folder else Progress()


def _read_into(state: dict[str, Any], folder: Path) -> None:
    with _one_process(), _said_as_usage_error(folder, "read", "Delete it to go on from the one before"):
        dcp_load(state, checkpoint_id=folder, no_dist=True)


def load(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore `model` and `optimizer` in place.

    Raises:
        UsageError: the checkpoint is damaged or of another student.
    """
    state = _state(model, optimizer)
    _read_into(state, folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return read_progress(folder)


def load_model(folder: Path, model: Decoder) -> None:
    """Restore the parameters of `model` alone, in place; errors as in `load`."""
    _read_into({"model": dict(model.named_parameters())}, folder)
