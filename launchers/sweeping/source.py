"""Where a sweep is written: a function of `experiments/` that returns a `Sweep`, or one of a file of the user's own."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.sweep import Sweep
from kd_core.errors import UsageError
from launchers import catalog


def find(text: str) -> tuple[str, Callable[[], Sweep]]:
    """A sweep by its name in experiments/, or as `FILE.py:NAME`: its name, and the function that gives it.

    Raises:
        UsageError: there is none; names the nearest.
    """
    file, colon, name = text.rpartition(":")
    if not colon:
        known = {entry.name: entry for entry in catalog.entries() if entry.kind == catalog.SWEEP}
        if name not in known:
            raise UsageError(f"--sweep={name}: no such sweep in experiments/. {catalog.did_you_mean(name, known)}")
        return name, known[name].function()
    functions = _functions_of(Path(file), text)
    if name not in functions:
        raise UsageError(f"--sweep={text}: no function {name!r} there. {catalog.did_you_mean(name, functions)}")
    return name, functions[name]


def _functions_of(path: Path, text: str) -> dict[str, Callable[[], Any]]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"--sweep={text}: {path} is no Python file. Wanted NAME, or FILE.py:NAME.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        name: each for name, each in vars(module).items() if inspect.isfunction(each) and each.__module__ == path.stem
    }
