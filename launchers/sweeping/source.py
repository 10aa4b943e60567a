"""Where a sweep is written: a function of `experiments/` that returns a `Sweep`, or one of a file of the user's own."""

from collections.abc import Callable
from pathlib import Path

from experiments.sweep import Sweep
from launchers import catalog, user_code


def find(text: str) -> tuple[str, Callable[[], Sweep]]:
    """A sweep by its name in experiments/, or as `FILE.py:NAME`: its name, and the function that gives it.

    Raises:
        UsageError: there is none (names the nearest), or its file cannot be imported.
    """
    file, colon, name = text.rpartition(":")
    if not colon:
        said = f"--sweep={name}"
        return name, user_code.load(catalog.find(name, catalog.SWEEP, said=said), said)
    return name, user_code.function_of(Path(file), name, f"--sweep={text}", "NAME, or FILE.py:NAME")
