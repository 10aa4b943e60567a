"""Functions of experiment files, imported and called so that an error in one becomes a message with file and line."""

import functools
import inspect
import re
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fiddle as fdl

from experiments.config import user_files
from experiments.config.catalog import FOLDER, Entry, did_you_mean, nearest
from experiments.config.paths import is_of_type, short_path, shown_type, walk
from kd_core.errors import UsageError

R = TypeVar("R")


def _is_user_code(filename: str) -> bool:
    """Checks whether a file defines experiments or sweeps, rather than the machinery for them."""
    path = Path(filename)
    is_machinery = path.is_relative_to(FOLDER / "config") or path == FOLDER / "base" / "sweep_definition.py"
    return user_files.is_user_file(filename) or (path.is_relative_to(FOLDER) and not is_machinery)


def _location(error: BaseException, file: str) -> tuple[str, dict[str, Any]]:
    """Returns the file and line of the innermost frame in `file` or an experiment's file, and the frame's variables."""
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == file or _is_user_code(frame.f_code.co_filename)
    ]
    if not frames:
        return "", {}
    frame, line = frames[-1]
    return f"{short_path(frame.f_code.co_filename)}:{line}: ", dict(frame.f_locals)


def _suggestion(error: Exception, names: dict[str, Any]) -> str:
    """Suggests the nearest name in the configs that the failing frame holds."""
    if dict_error := re.fullmatch(r"'dict' object has no attribute '(\w+)'", str(error)):
        return f"It is a dictionary: [{dict_error[1]!r}]."
    if isinstance(error, TypeError):
        wrong_name = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    elif isinstance(error, (AttributeError, KeyError)):
        wrong_name = re.search(r"'(\w+)'", str(error))
    else:
        return ""
    configs = [value for value in names.values() if isinstance(value, fdl.Buildable)]
    config_names = {place.name for config in configs for place in walk(config)}
    return nearest(wrong_name[1], config_names) if wrong_name else ""


def run_guarded(work: Callable[[], R], error_prefix: str, file: str = "") -> R:
    """Returns the result of `work`, which runs code of `experiments/` or of the user's `file`.

    `error_prefix` begins the message of an error.

    Raises:
        UsageError: for anything that `work` raises, with file and line.
    """
    try:
        return work()
    except SystemExit as error:
        location, _ = _location(error, file)
        raise UsageError(f"{error_prefix}: {location}ended the program ({error.code}).") from error
    except UsageError as error:
        location, _ = _location(error, file)
        raise UsageError(f"{error_prefix}: {location}{error}") from error
    except SyntaxError as error:
        raise UsageError(f"{error_prefix}: {short_path(error.filename or '')}:{error.lineno}: {error.msg}.") from error
    except Exception as error:
        location, names = _location(error, file)
        # The first line of the error. Fiddle's ends with the whole config, which is left out.
        text = traceback.TracebackException.from_exception(error).format_exception_only()
        line = re.sub(r" has been set on <Config\[.*", " is there.", "".join(text).split("\n", 1)[0].strip())
        raise UsageError(f"{error_prefix}: {location}{line} {_suggestion(error, names)}".rstrip()) from error


def _check_arguments(function: Callable[..., Any], arguments: dict[str, Any], skip: int, error_prefix: str) -> None:
    """Refuses unknown, missing and wrongly typed arguments. The first `skip` parameters are not checked."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    hints = run_guarded(lambda: typing.get_type_hints(function), error_prefix) if arguments else {}
    for name, value in arguments.items():
        if name not in {p.name for p in parameters}:
            suggestion = did_you_mean(name, (p.name for p in parameters)) if parameters else "It takes none."
            raise UsageError(f"{error_prefix}: no argument {name!r}. {suggestion}")
        if not is_of_type(value, hints.get(name, Any)):
            raise UsageError(f"{error_prefix}: {name}: got {value!r}, wanted {shown_type(hints[name])}.")
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in arguments]
    if missing:
        raise UsageError(f"{error_prefix}: {missing[0]!r} has no default. Give it: ({missing[0]}=…).")


def call(entry: Entry, arguments: dict[str, Any], error_prefix: str, *args: Any) -> Any:
    """Calls an entry's function with `args` and the keyword `arguments`, and returns its result.

    Raises:
        UsageError: wrong arguments, or anything that its file raises, with file and line.
    """
    function = run_guarded(entry.load, error_prefix)
    _check_arguments(function, arguments, len(args), error_prefix)
    return run_guarded(lambda: function(*args, **arguments), error_prefix)


def base_config(entry: Entry, arguments: dict[str, Any], error_prefix: str) -> fdl.Config[Any]:
    """Returns the config that a base function makes.

    Raises:
        UsageError: as in `call`, or the result is not of the kind that the function's annotation names.
    """
    result: Any = call(entry, arguments, error_prefix)
    kind = shown_kind(result)
    if kind != f"fdl.Config[{entry.kind}]":
        code = getattr(inspect.unwrap(entry.load()), "__code__", None)
        location = f"{short_path(code.co_filename)}:{code.co_firstlineno}" if code else entry.module
        raise UsageError(
            f"{error_prefix}: {location}: {entry.name} returned {kind}, wanted "
            f"fdl.Config[{entry.kind}]." + (" Is there no `return config` at its end?" if result is None else "")
        )
    return result


def shown_kind(value: Any) -> str:
    """Returns a value's kind as messages show it."""
    if isinstance(value, fdl.Config):
        made: Any = fdl.get_callable(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return f"fdl.Config[{made.__name__}]"
    if value is None:
        return "None"
    return f"the function {value.__name__}" if inspect.isfunction(value) else f"an object of {type(value).__name__}"


def load(entry: Entry, error_prefix: str) -> Any:
    """Imports an entry and returns its function, or the tag's class.

    Raises:
        UsageError: as in `call`.
    """
    return run_guarded(entry.load, error_prefix)


def load_from_file(text: str, error_prefix: str, expected: str, kind: str = "") -> Entry:
    """Imports a file and returns the function in it that `FILE.py:NAME` names.

    `expected` describes valid names in the message of an error.

    Raises:
        UsageError: there is none (the message names the nearest), or the file cannot be imported.
    """
    file, _, name = text.partition(".py:") if ".py:" in text else (text.removesuffix(".py"), "", "")
    path = Path(f"{file}.py").expanduser()
    if not path.is_file():
        raise UsageError(f"{error_prefix}: {path} is no Python file. Wanted {expected}.")
    module = run_guarded(lambda: user_files.load(user_files.read(path)), error_prefix)
    functions = [
        key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    if not name:
        raise UsageError(
            f"{error_prefix}: names no function of the file. Add it: {path}:{'|'.join(functions) or 'NAME'}."
        )
    if name not in functions:
        raise UsageError(f"{error_prefix}: no function {name!r} there. {did_you_mean(name, functions)}")
    return Entry(name, module.__name__, kind, "")


def call_function(function: Callable[..., R], error_prefix: str, *args: Any) -> R:
    """Calls a function of any file with `args`, and returns its result.

    Raises:
        UsageError: as in `run_guarded`.
    """
    wrapped: Any = function.func if isinstance(function, functools.partial) else function
    file = str(inspect.getsourcefile(wrapped)) if inspect.isfunction(wrapped) else ""
    return run_guarded(functools.partial(function, *args), error_prefix, file)
