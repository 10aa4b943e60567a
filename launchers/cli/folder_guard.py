"""What a folder is already, by files that every one of its kind has: nothing is written over another kind."""

from pathlib import Path

from kd_core.errors import UsageError

A_RUN, A_SWEEP, CACHES, A_MODEL = "a run", "a sweep", "teacher caches", "a model"
MARKS = {
    A_RUN: ("attempts",),
    A_SWEEP: ("sweep.json",),
    CACHES: ("manifest.json", "plan.json", "train/plan.json", "validation/plan.json"),
    A_MODEL: ("tokenizer.json", "model.safetensors", "model.safetensors.index.json"),
}


def refuse_others(folder: Path, kind: str, flag: str) -> None:
    """Refuse to write `kind` into a folder that holds another one of them.

    Raises:
        UsageError: with what stands there.
    """
    for other, marks in MARKS.items():
        found = next((mark for mark in marks if (folder / mark).exists()), None)
        if other != kind and found:
            raise UsageError(
                f"--{flag}={folder}: holds {other} ({found}), wanted {kind} or nothing. Name another folder."
            )
