"""`--config` items, applied in order, to one Fiddle config.

    NAME  NAME(arg=v)            a base function of experiments/ (first item)
    config_file:F  run:RUN_DIR   a frozen record (first item)
    fiddler:NAME(arg=v)          a function that changes the config
    path=value                   one value; text needs no quotes

Fiddle's long forms `config:NAME` and `set:path=value` mean the same. Paths and types are checked before anything
is built.
"""

import ast
import contextlib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fiddle as fdl
from fiddle.experimental import serialization
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from kd_core.errors import UsageError
from launchers.catalog import FIDDLER, did_you_mean, find

OUR_PACKAGES = ("kd_core.", "data.", "experiments.")
WORDS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


@dataclass
class Resolved:
    """A config, the name it began with, and which flag set which path."""

    config: fdl.Config[Any]
    name: str
    set_by: dict[str, str] = field(default_factory=dict)


class _OurPackagesOnly(serialization.DefaultPyrefPolicy):
    """Loading a record imports what it names, so it may name our own classes and functions only."""

    def allows_import(self, module: str, symbol: str) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether the record may name it."""
        del symbol
        return f"{module}.".startswith(OUR_PACKAGES) or module in ("builtins", "fiddle._src.config")


def _parse_call(text: str, item: str) -> tuple[str, dict[str, Any]]:
    """`NAME` or `NAME(arg=literal, …)`."""
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            return node.func.id, {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError):
        pass
    raise UsageError(f"--config={item}: cannot be read. Wanted NAME, NAME(arg=value) or path=value.")


def _call(kind: str, text: str, item: str, *args: Any) -> Any:
    name, arguments = _parse_call(text, item)
    function = find(name, kind).function()
    try:
        return function(*args, **arguments)
    except TypeError as error:
        raise UsageError(f"--config={item}: {error}.") from None


def load_record(path: Path) -> fdl.Config[Any]:
    """A frozen config.

    Raises:
        UsageError: missing, damaged, or naming code that is not ours.
    """
    try:
        return serialization.load_json(path.read_text(), pyref_policy=_OurPackagesOnly())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; wanted the config.json of a run.") from None
    except serialization.PyrefPolicyError as error:
        raise UsageError(f"{path}: names code outside this project, so it was not loaded ({error}).") from None
    except Exception as error:  # a record of another version fails in as many ways as there are versions
        raise UsageError(f"{path}: not a record of this version's experiments ({error}).") from None


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, fdl.Buildable):
        arguments = fdl.ordered_arguments(node, include_defaults=True, include_unset=True)
        return {str(name): value for name, value in arguments.items()}
    if isinstance(node, dict):
        return {str(key): value for key, value in node.items()}
    return {}


def _wanted_type(node: Any, name: str) -> Any:
    if isinstance(node, fdl.Buildable):
        return typing.get_type_hints(fdl.get_callable(node)).get(name, Any)
    return Any


def _is_of_type(value: Any, wanted: Any) -> bool:
    """Every item of a collection is looked at; a bool is no number."""
    try:
        check_type(value, wanted, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return not (isinstance(value, bool) and wanted in (int, float))


def _checked(value: Any, wanted: Any, said: str, shown: str) -> Any:
    """The value as the type that is wanted: a list as a tuple, a whole number as a float."""
    if isinstance(value, list) and typing.get_origin(wanted) is not list:
        value = tuple(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not _is_of_type(value, wanted):
        name = wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")
        raise UsageError(f"{said}: got {shown}, wanted {name}.")
    return value


def _parse_value(text: str, wanted: Any, said: str) -> Any:
    if wanted is str:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    value: Any = text
    with contextlib.suppress(SyntaxError, ValueError):
        value = WORDS[text] if text in WORDS else ast.literal_eval(text)
    return _checked(value, wanted, said, repr(text))


def _find(config: fdl.Config[Any], path: str, said: str) -> tuple[Any, str]:
    """The node that holds the last name of `path`, and that name; `said` begins the error."""
    node: Any = config
    *parents, last = path.split(".")
    for depth, name in enumerate([*parents, last]):
        children = _children(node)
        if name not in children:
            where = ".".join(path.split(".")[:depth]) or "the experiment"
            raise UsageError(f"{said}: {where} has no {name!r}. {did_you_mean(name, children)}")
        if depth < len(parents):
            node = children[name]
    return node, last


def _put(node: Any, name: str, value: Any) -> None:
    if isinstance(node, dict):
        node[name] = value
    else:
        setattr(node, name, value)


def _refuse_part(node: Any, name: str, path: str, said: str) -> None:
    current = _children(node)[name]
    if isinstance(current, (fdl.Buildable, dict)):
        inner = ", ".join(f"{path}.{name}" for name in _children(current))
        raise UsageError(f"{said}: {path} is a part, not a value. Set one of its values: {inner}.")


def set_path(config: fdl.Config[Any], item: str) -> str:
    """Apply `path=value`; returns the path.

    Raises:
        UsageError: no such path, a path to a part and not to a value, or a value of another type.
    """
    path, text = item.split("=", 1)
    said = f"--config={item}"
    node, last = _find(config, path, said)
    _refuse_part(node, last, path, said)
    _put(node, last, _parse_value(text, _wanted_type(node, last), said))
    return path


def set_value(config: fdl.Config[Any], path: str, value: Any, said: str) -> None:
    """Set what stands at `path` to a Python value, or to a config (which is copied); `said` begins the error.

    Raises:
        UsageError: as for `set_path`.
    """
    node, last = _find(config, path, said)
    wanted = _wanted_type(node, last)
    if isinstance(value, fdl.Buildable):
        made = fdl.get_callable(value)
        if isinstance(wanted, type) and isinstance(made, type) and not _makes(made, wanted):
            raise UsageError(f"{said}: got a {made.__name__}, wanted {wanted.__name__}.")
        _put(node, last, value.__deepcopy__({}))
        return
    _refuse_part(node, last, path, said)
    _put(node, last, _checked(value, wanted, said, repr(value)))


def _makes(made: type, wanted: type) -> bool:
    """Whether a config of `made` may stand where `wanted` is annotated; a protocol shows itself only when built."""
    return getattr(wanted, "_is_protocol", False) or issubclass(made, wanted)


def value_at(config: fdl.Config[Any], path: str, said: str) -> Any:
    """What stands at `path`, a default included; errors as for `set_path`."""
    node, last = _find(config, path, said)
    return _children(node)[last]


def _first(item: str, kind: str) -> Resolved:
    if item.startswith(("run:", "config_file:")):
        prefix, target = item.split(":", 1)
        path = Path(target) / "config.json" if prefix == "run" else Path(target)
        config = load_record(path)
        found = fdl.get_callable(config).__name__
        if found != kind:
            raise UsageError(f"--config={item}: holds a {found}, wanted a {kind}.")
        return Resolved(config, Path(target).name)
    text = item.removeprefix("config:")
    if "=" in text.split("(")[0] or text.startswith(("fiddler:", "set:")):
        raise UsageError(f"--config={item}: the first --config must name an experiment (--list shows them).")
    return Resolved(_call(kind, text, item), _parse_call(text, item)[0])


def resolve(items: Sequence[str], kind: str) -> Resolved:
    """One config out of all items.

    Raises:
        UsageError: any mistake in them, with the item and what would be right.
    """
    if not items:
        raise UsageError("no --config given. Name an experiment: --config=NAME (--list shows them).")
    resolved = _first(items[0], kind)
    for item in items[1:]:
        apply(resolved, item)
    return resolved


def apply(resolved: Resolved, item: str) -> None:
    """Apply an item that names no experiment, in place; errors as for `resolve`."""
    text = item.removeprefix("set:")
    if item.startswith("fiddler:"):
        _call(FIDDLER, item.removeprefix("fiddler:"), item, resolved.config)
    elif "=" in text.split("(")[0]:
        resolved.set_by[set_path(resolved.config, text)] = f"--config={item}"
    else:
        raise UsageError(f"--config={item}: only the first --config names an experiment; wanted path=value.")


def frozen(config: fdl.Config[Any]) -> fdl.Config[Any]:
    """A copy in which every default is an explicit value, so that a change of defaults cannot change the record."""
    config = config.__deepcopy__({})

    def expand(node: Any) -> None:
        if isinstance(node, fdl.Buildable):
            for name, value in fdl.ordered_arguments(node, include_defaults=True).items():
                setattr(node, str(name), value)
        for child in _children(node).values():
            expand(child)

    expand(config)
    return config


def _who(node: Any, name: str, path: str, set_by: dict[str, str]) -> str:
    if path in set_by:
        return set_by[path]
    if isinstance(node, fdl.Buildable):
        if name not in node.__arguments__:
            return f"default of {fdl.get_callable(node).__name__}"
        history = node.__argument_history__[name]
        if not history:  # a record keeps values, not who set them
            return "the record"
        location = history[-1].location
        return f"{Path(location.filename).name}:{location.line_number}"
    return "the experiment"


def describe(resolved: Resolved) -> str:
    """One line a leaf: path = value, and who set it."""
    lines: list[str] = []

    def visit(node: Any, prefix: str) -> None:
        for name, value in _children(node).items():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(value, (fdl.Buildable, dict)):
                if isinstance(value, fdl.Buildable):
                    lines.append(f"{path} = {fdl.get_callable(value).__name__}  # {_who(node, name, path, {})}")
                visit(value, path)
            else:
                lines.append(f"{path} = {value!r}  # {_who(node, name, path, resolved.set_by)}")

    visit(resolved.config, "")
    return "\n".join(lines) + "\n"


def record(config: fdl.Config[Any]) -> str:
    """The frozen config as JSON."""
    return serialization.dump_json(frozen(config), indent=2) + "\n"
