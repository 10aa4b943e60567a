"""Where a sweep is written: a function of `experiments/` that returns a `Sweep`, or one of a file of the user's own."""

from collections.abc import Callable

from experiments.base.sweep_definition import Sweep
from experiments.config import catalog, user_code


def find(text: str) -> tuple[str, Callable[[], Sweep]]:
    """A sweep by its name in experiments/, or as `FILE.py:NAME`: its name, and the function that gives it.

    Raises:
        UsageError: there is none (names the nearest), or its file cannot be imported.
    """
    said = f"--sweep={text}"
    if ".py" in text:
        entry = user_code.of_file(text, said, "NAME, or FILE.py:NAME", catalog.SWEEP)
    else:
        entry = catalog.find(text, catalog.SWEEP, said=said)
    return entry.name, user_code.load(entry, said)
