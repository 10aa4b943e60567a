"""Guard against writing into a folder of another kind, which is recognised by files that each kind always has."""

from pathlib import Path

from kd_core.errors import UsageError
from kd_core.files import new_folder_target

A_RUN, A_SWEEP, CACHES, A_MODEL = "a run", "a sweep", "teacher caches", "a model"
MARKS = {
    A_RUN: ("attempts",),
    A_SWEEP: ("sweep.json",),
    CACHES: ("manifest.json", "plan.json", "train/plan.json", "validation/plan.json"),
    A_MODEL: ("tokenizer.json", "model.safetensors", "model.safetensors.index.json"),
}


def refuse_other_kinds(folder: Path, kind: str, flag: str) -> None:
    """Checks that a folder to write `kind` into holds no other kind.

    Raises:
        UsageError: it does. The message names the kind and the file that marks it.
    """
    for other, marks in MARKS.items():
        mark = next((name for name in marks if (folder / name).exists()), None)
        if other != kind and mark:
            raise UsageError(
                f"--{flag}={folder}: holds {other} ({mark}), wanted {kind} or nothing. Choose another folder."
            )


def refuse_full_folder(folder: Path, flag: str = "out") -> None:
    """Checks that a new folder can stand here.

    Raises:
        UsageError: it holds something, or a file or a link to a full folder stands in its place.
    """
    target = new_folder_target(folder)
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"--{flag}={folder}: holds something ({next(target.iterdir()).name}). Name a new folder.")
