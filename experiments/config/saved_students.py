"""Students as they lie on disk: Hugging Face folders, exports of runs, and checkpoints of them at any step."""

import logging
from pathlib import Path
from typing import Any

import fiddle as fdl

from data.tokenizer import Tokenizer
from experiments.base.chat_formats import chat_format
from experiments.config.frozen_records import load_record, recorded_student
from kd_core.errors import UsageError
from kd_core.hub import folder_of
from kd_core.students.huggingface.export_files import ChatFormat
from kd_core.students.starts.start import Pretrained, build
from kd_core.training.checkpoints import checkpoint
from kd_core.training.run_folder import RunFolder

log = logging.getLogger("kd")


def _checkpoint(run: RunFolder, step: str) -> Path | None:
    """Returns the checkpoint of a run that `step` names, if it is there."""
    if step == "last":
        return checkpoint.newest(run.checkpoints)
    if step == "best":
        policy: Any = fdl.build(load_record(run.path / "config.json").checkpoint)
        return next(iter(checkpoint.best_first(run.checkpoints, policy)), None)
    if not step.isdecimal():
        raise UsageError(f"--step={step}: wanted best, last or a number.")
    numbered = {int(folder.name[5:]): folder for folder in checkpoint.kept(run.checkpoints)}
    return numbered.get(int(step))


def is_run(path: Path) -> bool:
    """Checks whether a folder is that of a run."""
    return bool(RunFolder(path).attempts()) or (path / "config.txt").exists()


def find_student(path: Path, step: str | None) -> Path:
    """Returns the folder of a student: of a run its `export/`, or its checkpoint at `step` (best, last, a number).

    Raises:
        UsageError: there is none, or a `step` of what is no run.
    """
    run = RunFolder(path)
    if not is_run(path):
        if step is not None:
            raise UsageError(f"--step={step}: {path} is no run, so it has no steps. Leave --step out.")
        return path
    steps = ", ".join(str(int(folder.name[5:])) for folder in checkpoint.kept(run.checkpoints))
    there = f"It has checkpoints of the steps {steps}" if steps else "It has no checkpoint"
    if step is None:
        if not run.is_finished:
            then = ": name one by --step, as --step=last" if steps else " yet"
            raise UsageError(f"{path}: a run that is not finished. {there}{then}.")
        return run.export
    if found := _checkpoint(run, step):
        return found
    export = " Its export/ is whole: leave --step out." if run.is_finished else ""
    raise UsageError(f"--step={step}: {path} has no such checkpoint. {there}.{export}")


def load_student(folder: Path, device: Any) -> tuple[Any, Path]:
    """Build the model of a Hugging Face folder or a checkpoint, by one process; returns its tokenizer's folder too.

    Raises:
        UsageError: it is neither, or damaged.
    """
    if not (folder / "progress.json").exists():
        return build(Pretrained(str(folder)), device, 0, Tokenizer(folder).vocab_size), folder
    start = recorded_student(folder / "config.json")
    tokenizer_folder = folder_of(start.folder)
    model = build(start, device, 0, Tokenizer(tokenizer_folder).vocab_size)
    checkpoint.load_model(folder, model)
    return model, tokenizer_folder


def recorded_chat_format(folder: Path) -> ChatFormat | None:
    """Returns how the conversations were written that a checkpoint was trained on; None of a Hugging Face folder."""
    if not (folder / "progress.json").exists():
        return None
    try:
        return chat_format(fdl.build(load_record(folder / "config.json").shards))
    except UsageError as error:
        log.warning("%s The student keeps its own chat template and end of turn, for its cache cannot be read.", error)
        return None
