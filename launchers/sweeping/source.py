"""Where a sweep is written: a function of `experiments/` that returns a `Sweep`, or one of a file of the user's own."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.sweep import Sweep
from kd_core.errors import UsageError
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
    functions = _functions_of(Path(file), text)
    if name not in functions:
        raise UsageError(f"--sweep={text}: no function {name!r} there. {catalog.did_you_mean(name, functions)}")
    return name, functions[name]


def _functions_of(path: Path, text: str) -> dict[str, Callable[[], Any]]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"--sweep={text}: {path} is no Python file. Wanted NAME, or FILE.py:NAME.")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    user_code.guarded(lambda: loader.exec_module(module), f"--sweep={text}", str(spec.origin))
    return {
        name: each for name, each in vars(module).items() if inspect.isfunction(each) and each.__module__ == path.stem
    }
