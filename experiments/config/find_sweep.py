"""Lookup of a sweep: a function that returns a `Sweep`, in `experiments/` or in a user's file."""

from collections.abc import Callable

from experiments.base.sweep_definition import Sweep
from experiments.config import catalog, user_code


def find_sweep(text: str) -> tuple[str, Callable[[], Sweep]]:
    """Returns a sweep's name and the function that makes it. `text` is a name of `experiments/`, or `FILE.py:NAME`.

    Raises:
        UsageError: there is none (the message names the nearest), or its file cannot be imported.
    """
    error_prefix = f"--sweep={text}"
    if ".py" in text:
        entry = user_code.load_from_file(text, error_prefix, "NAME, or FILE.py:NAME", catalog.SWEEP)
    else:
        entry = catalog.find_entry(text, catalog.SWEEP, error_prefix=error_prefix)
    return entry.name, user_code.load(entry, error_prefix)
