"""Functions of experiment files, imported and called so that a mistake in one is a message with its file and line."""

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


def _is_users(filename: str) -> bool:
    """Returns whether a file defines experiments or sweeps, rather than the machinery for them."""
    path = Path(filename)
    is_machinery = path.is_relative_to(FOLDER / "config") or path == FOLDER / "base" / "sweep_definition.py"
    return user_files.holds(filename) or (path.is_relative_to(FOLDER) and not is_machinery)


def _place(error: BaseException, file: str) -> tuple[str, dict[str, Any]]:
    """File and line of the innermost frame that is in `file` or an experiment's, and what its names stand for."""
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == file or _is_users(frame.f_code.co_filename)
    ]
    if not frames:
        return "", {}
    frame, line = frames[-1]
    return f"{short_path(frame.f_code.co_filename)}:{line}: ", dict(frame.f_locals)


def _hint(error: Exception, names: dict[str, Any]) -> str:
    """The nearest name among those of the configs that the failing line had at hand."""
    if of_dict := re.fullmatch(r"'dict' object has no attribute '(\w+)'", str(error)):
        return f"It is a dictionary: [{of_dict[1]!r}]."
    if isinstance(error, TypeError):
        wrong = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    elif isinstance(error, (AttributeError, KeyError)):
        wrong = re.search(r"'(\w+)'", str(error))
    else:
        return ""
    configs = [value for value in names.values() if isinstance(value, fdl.Buildable)]
    known = {place.name for config in configs for place in walk(config)}
    return nearest(wrong[1], known) if wrong else ""


def guarded(work: Callable[[], R], said: str, file: str = "") -> R:
    """What `work` returns, which runs code of experiments/ or of another `file` of the user's.

    Raises:
        UsageError: for anything that it raises, with file and line.
    """
    try:
        return work()
    except SystemExit as error:
        where, _ = _place(error, file)
        raise UsageError(f"{said}: {where}ended the program ({error.code}).") from error
    except UsageError as error:
        where, _ = _place(error, file)
        raise UsageError(f"{said}: {where}{error}") from error
    except SyntaxError as error:
        raise UsageError(f"{said}: {short_path(error.filename or '')}:{error.lineno}: {error.msg}.") from error
    except Exception as error:
        where, names = _place(error, file)
        text = traceback.TracebackException.from_exception(error).format_exception_only()
        line = re.sub(r" has been set on <Config\[.*", " is there.", "".join(text).split("\n", 1)[0].strip())
        raise UsageError(f"{said}: {where}{line} {_hint(error, names)}".rstrip()) from error


def _check_arguments(function: Callable[..., Any], arguments: dict[str, Any], skip: int, said: str) -> None:
    """Refuse arguments that the function does not have, or of another type."""
    known = list(inspect.signature(function).parameters.values())[skip:]
    hints = guarded(lambda: typing.get_type_hints(function), said) if arguments else {}
    for name, value in arguments.items():
        if name not in {each.name for each in known}:
            takes = did_you_mean(name, (each.name for each in known)) if known else "It takes none."
            raise UsageError(f"{said}: no argument {name!r}. {takes}")
        if not is_of_type(value, hints.get(name, Any)):
            raise UsageError(f"{said}: {name}: got {value!r}, wanted {shown_type(hints[name])}.")
    missing = [each.name for each in known if each.default is each.empty and each.name not in arguments]
    if missing:
        raise UsageError(f"{said}: {missing[0]!r} has no default. Give it: ({missing[0]}=…).")


def call(entry: Entry, arguments: dict[str, Any], said: str, *args: Any) -> Any:
    """What the function returns for `args` and `arguments`.

    Raises:
        UsageError: wrong arguments, or anything that its file raises, with file and line.
    """
    function = guarded(entry.load, said)
    _check_arguments(function, arguments, len(args), said)
    return guarded(lambda: function(*args, **arguments), said)


def config_of(entry: Entry, arguments: dict[str, Any], said: str) -> fdl.Config[Any]:
    """The config that a base function returns, of the kind that its annotation says; errors as in `call`."""
    found: Any = call(entry, arguments, said)
    got = shown_kind(found)
    if got != f"fdl.Config[{entry.kind}]":
        code = getattr(inspect.unwrap(entry.load()), "__code__", None)
        where = f"{short_path(code.co_filename)}:{code.co_firstlineno}" if code else entry.module
        raise UsageError(
            f"{said}: {where}: {entry.name} returned {got}, wanted "
            f"fdl.Config[{entry.kind}]." + (" Is there no `return config` at its end?" if found is None else "")
        )
    return found


def shown_kind(value: Any) -> str:
    """A value by its kind, as a message shows it."""
    if isinstance(value, fdl.Config):
        made: Any = fdl.get_callable(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return f"fdl.Config[{made.__name__}]"
    if value is None:
        return "None"
    return f"the function {value.__name__}" if inspect.isfunction(value) else f"an object of {type(value).__name__}"


def load(entry: Entry, said: str) -> Any:
    """Import it; errors as in `call`."""
    return guarded(entry.load, said)


def of_file(text: str, said: str, wanted: str, kind: str = "") -> Entry:
    """Returns the function that `FILE.py:NAME` names; the file is imported. `wanted` says what could have been named.

    Raises:
        UsageError: there is none (names the nearest), or the file cannot be imported.
    """
    file, _, name = text.partition(".py:") if ".py:" in text else (text.removesuffix(".py"), "", "")
    path = Path(f"{file}.py").expanduser()
    if not path.is_file():
        raise UsageError(f"{said}: {path} is no Python file. Wanted {wanted}.")
    module = guarded(lambda: user_files.load(user_files.read(path)), said)
    functions = [
        key for key, each in vars(module).items() if inspect.isfunction(each) and each.__module__ == module.__name__
    ]
    if not name:
        raise UsageError(f"{said}: names no function of the file. Add it: {path}:{'|'.join(functions) or 'NAME'}.")
    if name not in functions:
        raise UsageError(f"{said}: no function {name!r} there. {did_you_mean(name, functions)}")
    return Entry(name, module.__name__, kind, "")


def of(function: Callable[..., R], said: str, *args: Any) -> R:
    """What a function of any file returns; errors as in `guarded`."""
    plain: Any = function.func if isinstance(function, functools.partial) else function
    file = str(inspect.getsourcefile(plain)) if inspect.isfunction(plain) else ""
    return guarded(functools.partial(function, *args), said, file)
