"""Students on disk: Hugging Face folders, exports of runs, and their checkpoints at any step."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fiddle as fdl

from data.tokenizer import Tokenizer
from experiments.base.chat_formats import chat_format
from experiments.config.frozen_records import load_record, recorded_student
from kd_core.errors import UsageError
from kd_core.hub import resolve_folder
from kd_core.students.huggingface.export_files import ChatFormat
from kd_core.students.huggingface.weights import stored_architecture
from kd_core.students.starts.start import Pretrained, StudentInit, build_student
from kd_core.students.starts.transformers_start import Transformers
from kd_core.training.checkpoints import checkpoint
from kd_core.training.run_folder import RunFolder

log = logging.getLogger("kd")


def _checkpoint(run: RunFolder, step: str) -> Path | None:
    """Returns the checkpoint of a run that `step` (best, last or a number) names, or None if it does not exist."""
    if step == "last":
        return checkpoint.newest(run.checkpoints)
    if step == "best":
        policy: Any = fdl.build(load_record(run.path / "config.json").checkpoint)
        return next(iter(checkpoint.checkpoints_by_metric(run.checkpoints, policy)), None)
    if not step.isdecimal():
        raise UsageError(f"--step={step}: wanted best, last or a number.")
    numbered = {int(folder.name[5:]): folder for folder in checkpoint.list_checkpoints(run.checkpoints)}
    return numbered.get(int(step))


def is_run(path: Path) -> bool:
    """Checks whether a folder is that of a run."""
    return bool(RunFolder(path).attempts()) or (path / "config.txt").exists()


def find_student(path: Path, step: str | None) -> Path:
    """Returns a student's folder. For a run it is `export/`, or the checkpoint at `step` (best, last or a number).

    Raises:
        UsageError: there is none, or a `step` is given for a folder that is no run.
    """
    run = RunFolder(path)
    if not is_run(path):
        if step is not None:
            raise UsageError(f"--step={step}: {path} is no run, so it has no steps. Leave --step out.")
        return path
    steps = ", ".join(str(int(folder.name[5:])) for folder in checkpoint.list_checkpoints(run.checkpoints))
    available = f"It has checkpoints of the steps {steps}" if steps else "It has no checkpoint"
    if step is None:
        if not run.is_finished:
            next_step = ": name one by --step, as --step=last" if steps else " yet"
            raise UsageError(f"{path}: a run that is not finished. {available}{next_step}.")
        return run.export
    if folder := _checkpoint(run, step):
        return folder
    choices = ["name one of them"] * bool(steps) + ["leave --step out for its export/"] * run.is_finished
    next_step = f": {', or '.join(choices)}" if choices else " yet"
    raise UsageError(f"--step={step}: {path} has no such checkpoint. {available}{next_step}.")


def recorded_precision(path: Path) -> str | None:
    """Returns the recorded precision of the run that a run, export or checkpoint folder belongs to, if any."""
    folder = path.absolute()
    if folder.name == "export":
        return RunFolder(folder.parent).precision()
    return RunFolder(folder.parents[1] if folder.parent.name == "checkpoints" else folder).precision()


def _start_of(folder: Path) -> StudentInit:
    """Returns a start from a folder: our decoder where it has the family, else transformers if it is installed."""
    try:
        stored_architecture(folder)
    except UsageError as reason:
        if find_spec("transformers") is None or not (folder / "config.json").exists():
            raise
        log.info("%s: a student of transformers, because our decoder does not support it (%s)", folder, reason)
        return Transformers(str(folder))
    return Pretrained(str(folder))


def load_student(folder: Path, device: Any) -> tuple[Any, Path]:
    """Builds the model of a Hugging Face folder or a checkpoint on one process. Returns it and its tokenizer's folder.

    Raises:
        UsageError: the folder is neither, or damaged.
    """
    if not (folder / "progress.json").exists():
        return build_student(_start_of(folder), device, 0, Tokenizer(folder).vocab_size), folder
    start = recorded_student(folder / "config.json")
    tokenizer_folder = resolve_folder(start.folder)
    model = build_student(start, device, 0, Tokenizer(tokenizer_folder).vocab_size)
    checkpoint.load_model(folder, model)
    return model, tokenizer_folder


def recorded_chat_format(folder: Path) -> ChatFormat | None:
    """Returns the format of the conversations that a checkpoint was trained on.

    It is None for a Hugging Face folder and, with a warning, where the checkpoint's cache cannot be read.
    """
    if not (folder / "progress.json").exists():
        return None
    try:
        return chat_format(fdl.build(load_record(folder / "config.json").shards))
    except UsageError as error:
        log.warning("%s The student keeps its own chat template and end of turn, for its cache cannot be read.", error)
        return None
