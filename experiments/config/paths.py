"""Values of a config by their dotted paths: looked up, parsed from text, and checked against annotations."""

import ast
import contextlib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

import fiddle as fdl
from fiddle.experimental import serialization
from fiddle.history import ChangeKind
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from experiments.config.catalog import FOLDER, did_you_mean
from experiments.config.record_policy import RecordImportPolicy
from kd_core.errors import UsageError

LITERALS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


def children(node: Any) -> dict[str, Any]:
    """Returns the values directly below a node of a config by name, defaults included."""
    if isinstance(node, fdl.Buildable):
        arguments = fdl.ordered_arguments(node, include_defaults=True, include_unset=True)
        # Fiddle has a placeholder for a default that a dataclass makes anew each time.
        made: Any = getattr(fdl.get_callable(node), "__dataclass_fields__", {})
        return {str(k): made[k].default_factory() if repr(v) == "<factory>" else v for k, v in arguments.items()}
    if isinstance(node, dict):
        return {str(key): value for key, value in node.items()}
    return {}


class Place(typing.NamedTuple):
    """A value of a config: its path, the node that holds it under `name`, the value itself, and its annotation."""

    path: str
    node: Any
    name: str
    value: Any
    annotation: Any

    @property
    def is_part(self) -> bool:
        """Returns True for a config or dictionary, which has values of its own."""
        return isinstance(self.value, (fdl.Buildable, dict))

    @property
    def tags(self) -> list[Any]:
        return sorted(fdl.get_tags(self.node, self.name), key=str) if isinstance(self.node, fdl.Buildable) else []

    @property
    def is_set(self) -> bool:
        """Returns False where the default applies."""
        return not isinstance(self.node, fdl.Buildable) or self.name in self.node.__arguments__

    def put(self, value: Any) -> None:
        if isinstance(self.node, dict):
            self.node[self.name] = value
        else:
            setattr(self.node, self.name, value)

    def set_at(self) -> str:
        """Returns the file and line that set the value last. For a default it names the owner."""
        if not self.is_set:
            return f"default of {fdl.get_callable(self.node).__name__}"
        if not isinstance(self.node, fdl.Buildable):
            return "the experiment"
        history = self.node.__argument_history__[self.name]
        # A tag that was added later is part of the history too.
        values = [entry for entry in history if entry.kind is ChangeKind.NEW_VALUE]
        if not values:
            return "a record"
        location = values[-1].location
        return f"{short_path(location.filename)}:{location.line_number}"


def short_path(filename: str) -> str:
    """Returns a file's path relative to the project's folder, or only its name where it lies outside."""
    path, root = Path(filename), FOLDER.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _is_mapping(hint: Any) -> bool:
    """Checks whether an annotation is a mapping with a value type, as `dict[str, Term]`."""
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def walk(node: Any, prefix: str = "", hint: Any = Any) -> Iterator[Place]:
    """Yields all places below a node, each part before the values in it."""
    # Arguments have annotations of their own, a dictionary's values share one.
    hints = typing.get_type_hints(fdl.get_callable(node)) if isinstance(node, fdl.Buildable) else {}
    value_type = next((typing.get_args(kind)[1] for kind in (hint, *typing.get_args(hint)) if _is_mapping(kind)), Any)
    for name, value in children(node).items():
        place = Place(f"{prefix}{name}", node, name, value, hints.get(name, Any) if hints else value_type)
        yield place
        if place.is_part:
            yield from walk(value, f"{place.path}.", place.annotation)


def find_place(config: fdl.Config[Any], path: str, error_prefix: str) -> Place:
    """Returns the place at a path. `error_prefix` begins the message of an error.

    Raises:
        UsageError: there is none. The message names the nearest.
    """
    places = {place.path: place for place in walk(config)}
    if path in places:
        return places[path]
    # Walk down the path to the first name that does not exist.
    parent, name = "", ""
    for name in path.split("."):
        if f"{parent}{name}" not in places:
            break
        parent += f"{name}."
    dotted = re.sub(r"""\[['"]?(\w+)['"]?\]""", r".\1", path)  # loss.terms['kd'], as Python and Fiddle write it
    matches = [other for other in places if other == dotted or other.endswith(f".{dotted}")]
    inner = [other.removeprefix(parent) for other in places if other.startswith(parent)]
    suggestion = (
        f"Did you mean {matches[0]!r}?" if len(matches) == 1 else did_you_mean(name, {x for x in inner if "." not in x})
    )
    raise UsageError(f"{error_prefix}: {parent[:-1] or 'the experiment'} has no {name!r}. {suggestion}")


def shown_type(hint: Any) -> str:
    """Returns an annotation as its author wrote it, or the values of a `Literal`."""
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return re.sub(r"\b(?:[a-z_0-9]+\.)+(?=[A-Za-z])", "", text)


def is_of_type(value: Any, hint: Any) -> bool:
    """Checks a value against its annotation, including every item of a collection. A bool is no number."""
    if isinstance(value, bool) and hint in (int, float):
        return False
    if isinstance(value, fdl.Buildable):
        target = fdl.get_callable(value)
        value, hint = target, type[hint] if hint is not Any and isinstance(target, type) else Any
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return True


def _accepts(hint: Any, kind: type) -> bool:
    return hint is kind or kind in typing.get_args(hint)


def _to_python_floats(value: Any) -> Any:
    """Converts numpy's float64, a subclass of float that no record holds, to Python's, also within a tuple or list."""
    if type(value) in (tuple, list):
        return type(value)(map(_to_python_floats, value))
    return float(value) if isinstance(value, float) else value


def _fit(value: Any, hint: Any, error_prefix: str, original: object) -> Any:
    """Converts a value to its annotated type: list to tuple, whole number to float, numpy's float to Python's."""
    value = _to_python_floats(value)
    if isinstance(value, list) and typing.get_origin(hint) is not list:
        value = tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and _accepts(hint, float) and not _accepts(hint, int):
        value = float(value)
    if not is_of_type(value, hint):
        raise UsageError(f"{error_prefix}: got {original!r}, wanted {shown_type(hint)}.")
    return value


def parse_value(text: str, hint: Any, error_prefix: str) -> Any:
    """Parses the text of a value by its annotation: text needs no quotes, a list becomes a tuple, 3 becomes 3.0.

    Raises:
        UsageError: it is of another type.
    """
    if hint is str or typing.get_origin(hint) is typing.Literal:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    return _fit(_literal(text), hint, error_prefix, text)


def _literal(text: str) -> Any:
    with contextlib.suppress(SyntaxError, ValueError):
        return LITERALS[text] if text in LITERALS else ast.literal_eval(text)
    return text


def set_path(config: fdl.Config[Any], item: str) -> str:
    """Applies `path=value` to a config and returns the path.

    Raises:
        UsageError: no such path, a path to a part and not to a value, or a value of another type.
    """
    path, text = item.split("=", 1)
    error_prefix = f"--config={item}"
    place = find_place(config, path, error_prefix)
    if not _put_parts(config, place, _literal(text), error_prefix):
        _refuse_part(place, error_prefix)
        place.put(parse_value(text, place.annotation, error_prefix))
    return path


def _put_parts(config: fdl.Config[Any], place: Place, value: Any, error_prefix: str) -> bool:
    """Sets a dictionary of parts from `{NAME: {SETTING: …}}`, or returns False where it is none."""
    kind: Any = typing.get_args(place.annotation)[1] if _is_mapping(place.annotation) else None
    if not (isinstance(value, dict) and is_dataclass(kind) and not inspect.isabstract(kind)):
        return False
    settings = cast(dict[Any, Any], value)
    if not all(isinstance(name, str) and isinstance(part, (dict, fdl.Buildable)) for name, part in settings.items()):
        raise UsageError(f"{error_prefix}: got {value!r}, wanted {shown_type(place.annotation)} as {{NAME: {{…}}}}.")
    place.put({name: fdl.Config(cast(Any, kind)) for name in settings})
    for name, part in settings.items():
        inner = {"": part} if isinstance(part, fdl.Buildable) else {f".{key}": item for key, item in part.items()}
        for key, item in inner.items():
            set_value(config, f"{place.path}.{name}{key}", item, error_prefix)
    return True


def _refuse_part(place: Place, error_prefix: str) -> None:
    # A dictionary without parts in it is set as a whole.
    is_value = isinstance(place.value, dict) and not any(
        isinstance(item, (fdl.Buildable, dict)) for item in cast(dict[str, Any], place.value).values()
    )
    if place.is_part and not is_value:
        inner_paths = ", ".join(f"{place.path}.{name}" for name in children(place.value))
        raise UsageError(f"{error_prefix}: {place.path} is a part, not a value. Set one of its values: {inner_paths}.")


def set_value(config: fdl.Config[Any], path: str, value: Any, error_prefix: str) -> None:
    """Sets the value at `path` to a Python value, or to a copy of a config. `error_prefix` begins an error's message.

    Raises:
        UsageError: as for `set_path`.
    """
    place = find_place(config, path, error_prefix)
    if isinstance(value, fdl.Buildable):
        class_name = fdl.get_callable(value).__name__
        if not is_of_type(value, place.annotation):
            raise UsageError(f"{error_prefix}: got a {class_name}, wanted {shown_type(place.annotation)}.")
        fitted: Any = value.__deepcopy__({})
    elif _put_parts(config, place, value, error_prefix):
        return
    else:
        _refuse_part(place, error_prefix)
        fitted = _fit(value, place.annotation, error_prefix, value)
        if isinstance(fitted, (int, float)) and not isinstance(fitted, bool) and _accepts(place.annotation, float):
            fitted = float(fitted) + 0.0  # 1 as 1.0 and -0.0 as 0.0: equal values make equal records
    _refuse_unrecordable(place._replace(value=fitted), error_prefix)
    place.put(fitted)


def _refuse_unrecordable(place: Place, error_prefix: str) -> None:
    """Refuses an object in place of its config, a function without a name of its own, and code of other packages."""
    if place.is_part:
        part = fdl.get_callable(place.value)
        policy = RecordImportPolicy()
        if not (policy.allows_import(part.__module__, part.__qualname__) and policy.allows_value(part)):
            raise UsageError(
                f"{error_prefix}: {place.path}: {part.__name__} stands in {part.__module__}, from which no record of "
                "a run is loaded. Let it stand in a file of experiments/, or in FILE.py of --config=FILE.py:NAME."
            )
        return
    try:
        serialization.dump_json(fdl.Config(dict, value=place.value), pyref_policy=RecordImportPolicy())
    except Exception as error:
        values = place.value if isinstance(place.value, (tuple, list)) else [place.value]
        if any(callable(value) for value in values):
            expected = "functions that stand in a file of experiments/ under names of their own"
        elif all(isinstance(value, float) for value in values):
            expected = f"Python's own numbers, {_to_python_floats(place.value)!r}"
        else:
            expected = f"its config, fdl.Config({type(place.value).__name__}, …)"
        raise UsageError(
            f"{error_prefix}: {place.path}: got {place.value!r}, which no record of a run can hold; wanted {expected}."
        ) from error


def check_values(config: fdl.Config[Any], *, recorded: bool) -> None:
    """Refuses wrong types, required values that are not set and, where `recorded`, values that no record can hold.

    Raises:
        UsageError: with the file and line that set the value.
    """
    for place in walk(config):
        if place.value is fdl.NO_VALUE:
            raise UsageError(
                f"{place.path}: not set, and has no default; wanted {shown_type(place.annotation)}. Set it."
            )
        if not place.is_set or isinstance(place.value, dict):
            continue
        if is_of_type(place.value, place.annotation):
            if recorded:
                _refuse_unrecordable(place, place.set_at())
            continue
        shown = fdl.get_callable(place.value).__name__ if place.is_part else repr(place.value)
        raise UsageError(f"{place.set_at()}: {place.path}: got {shown}, wanted {shown_type(place.annotation)}.")
