"""Values of a config by their paths: found, made of text, and checked against annotations before anything is built."""

import ast
import contextlib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import fiddle as fdl
from fiddle.experimental import serialization
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from experiments.config import user_files
from experiments.config.catalog import FOLDER, did_you_mean
from kd_core.errors import UsageError

OUR_PACKAGES = ("kd_core.", "data.", "experiments.")
# Of these, experiments are made of dataclasses alone. `config` handles records itself, so no record names it.
MACHINERY, NEVER = "experiments.base.", "experiments.config."
PLAIN = {
    "builtins": ("dict", "frozenset", "list", "set", "tuple"),
    "fiddle._src.config": ("BuildableTraverserMetadata", "Config"),
}
WORDS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


class OurPartsOnly(serialization.DefaultPyrefPolicy):
    """Policy of what a record may name: the dataclasses that experiments are made of, tags, and what a user's file of
    `experiments/`, or another one that is loaded, defines. Loading a record imports what it names, and building it
    calls that with any arguments, so no other function of ours and nothing that our modules have imported is let in.
    """

    def allows_import(self, module: str, symbol: str) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Lets a record import one plain name of our packages. A dot would lead on into another module."""
        if module in PLAIN:
            return symbol in PLAIN[module]
        is_ours = f"{module}.".startswith(OUR_PACKAGES) and not f"{module}.".startswith(NEVER)
        return (is_ours or module in user_files.known()) and symbol.isidentifier()

    def allows_value(self, value: Any) -> bool:
        """Lets a record use a dataclass, a tag, or what a user's file defines."""
        module = str(getattr(value, "__module__", ""))
        if module in PLAIN:
            return value.__name__ in PLAIN[module]
        is_users = module in user_files.known()
        if not is_users and (not f"{module}.".startswith(OUR_PACKAGES) or f"{module}.".startswith(NEVER)):
            return False
        if is_users or (module.startswith("experiments.") and not f"{module}.".startswith(MACHINERY)):
            return inspect.isclass(value) or inspect.isfunction(value)
        return inspect.isclass(value) and (is_dataclass(value) or issubclass(value, (fdl.Tag, Enum, tuple)))


def children(node: Any) -> dict[str, Any]:
    """What stands below a node of a config, by name, defaults included."""
    if isinstance(node, fdl.Buildable):
        arguments = fdl.ordered_arguments(node, include_defaults=True, include_unset=True)
        return {str(name): value for name, value in arguments.items()}
    if isinstance(node, dict):
        return {str(key): value for key, value in node.items()}
    return {}


class Place(typing.NamedTuple):
    """A value of a config: its path, the node that holds it under `name`, itself, and what its annotation wants."""

    path: str
    node: Any
    name: str
    value: Any
    wanted: Any

    @property
    def is_part(self) -> bool:
        """Whether it has values of its own."""
        return isinstance(self.value, (fdl.Buildable, dict))

    @property
    def tags(self) -> list[Any]:
        """The tags that it carries."""
        return sorted(fdl.get_tags(self.node, self.name), key=str) if isinstance(self.node, fdl.Buildable) else []

    @property
    def is_set(self) -> bool:
        """Whether somebody set it; a default stands there otherwise."""
        return not isinstance(self.node, fdl.Buildable) or self.name in self.node.__arguments__

    def put(self, value: Any) -> None:
        """Set it."""
        if isinstance(self.node, dict):
            self.node[self.name] = value
        else:
            setattr(self.node, self.name, value)

    def set_at(self) -> str:
        """File and line where it was set last; of a default, whose it is."""
        if not self.is_set:
            return f"default of {fdl.get_callable(self.node).__name__}"
        if not isinstance(self.node, fdl.Buildable):
            return "the experiment"
        history = self.node.__argument_history__[self.name]
        if not history:
            return "a record"
        location = history[-1].location
        return f"{short_path(location.filename)}:{location.line_number}"


def short_path(filename: str) -> str:
    """A file's path from the project's folder on; elsewhere its name."""
    path, root = Path(filename), FOLDER.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _is_mapping(wanted: Any) -> bool:
    """Checks whether an annotation is that of a mapping with values of a type."""
    origin = typing.get_origin(wanted)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def walk(node: Any, prefix: str = "", wanted: Any = Any) -> Iterator[Place]:
    """All places below a node, parts before what is in them."""
    hints = typing.get_type_hints(fdl.get_callable(node)) if isinstance(node, fdl.Buildable) else {}
    inner = next((typing.get_args(kind)[1] for kind in (wanted, *typing.get_args(wanted)) if _is_mapping(kind)), Any)
    for name, value in children(node).items():
        place = Place(f"{prefix}{name}", node, name, value, hints.get(name, Any) if hints else inner)
        yield place
        if place.is_part:
            yield from walk(value, f"{place.path}.", place.wanted)


def find(config: fdl.Config[Any], path: str, said: str) -> Place:
    """The place of a path; `said` begins the error.

    Raises:
        UsageError: there is none; names the nearest.
    """
    places = {place.path: place for place in walk(config)}
    if path in places:
        return places[path]
    parent, name = "", ""
    for name in path.split("."):
        if f"{parent}{name}" not in places:
            break
        parent += f"{name}."
    dotted = re.sub(r"""\[['"]?(\w+)['"]?\]""", r".\1", path)  # loss.terms['kd'], as Python and Fiddle write it
    whole = [known for known in places if known == dotted or known.endswith(f".{dotted}")]
    beside = [known.removeprefix(parent) for known in places if known.startswith(parent)]
    meant = (
        f"Did you mean {whole[0]!r}?" if len(whole) == 1 else did_you_mean(name, {x for x in beside if "." not in x})
    )
    raise UsageError(f"{said}: {parent[:-1] or 'the experiment'} has no {name!r}. {meant}")


def shown_type(wanted: Any) -> str:
    """An annotation as its author wrote it; of a choice, its values."""
    if typing.get_origin(wanted) is typing.Literal:
        return f"one of {', '.join(typing.get_args(wanted))}"
    text = wanted.__name__ if isinstance(wanted, type) and not typing.get_args(wanted) else str(wanted)
    return re.sub(r"\b(?:[a-z_0-9]+\.)+(?=[A-Za-z])", "", text)


def is_of_type(value: Any, wanted: Any) -> bool:
    """Every item of a collection is looked at; a bool is no number."""
    if isinstance(value, bool) and wanted in (int, float):
        return False
    if isinstance(value, fdl.Buildable):
        made = fdl.get_callable(value)
        value, wanted = made, type[wanted] if wanted is not Any and isinstance(made, type) else Any
    try:
        check_type(value, wanted, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return True


def _takes(wanted: Any, kind: type) -> bool:
    return wanted is kind or kind in typing.get_args(wanted)


def _plain(value: Any) -> Any:
    """Python's own float in place of numpy's, which is one and which no record holds; also within a tuple or list."""
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    return float(value) if isinstance(value, float) else value


def _fitted(value: Any, wanted: Any, said: str, shown: object) -> Any:
    """The value as the type that is wanted: a list as a tuple, a whole number as a float, numpy's float as Python's."""
    value = _plain(value)
    if isinstance(value, list) and typing.get_origin(wanted) is not list:
        value = tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and _takes(wanted, float) and not _takes(wanted, int):
        value = float(value)
    if not is_of_type(value, wanted):
        raise UsageError(f"{said}: got {shown!r}, wanted {shown_type(wanted)}.")
    return value


def parse_value(text: str, wanted: Any, said: str) -> Any:
    """A value of text, as the annotation wants it: text needs no quotes, a list is a tuple, 3 is 3.0.

    Raises:
        UsageError: it is of another type.
    """
    if wanted is str:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    value: Any = text
    with contextlib.suppress(SyntaxError, ValueError):
        value = WORDS[text] if text in WORDS else ast.literal_eval(text)
    return _fitted(value, wanted, said, text)


def set_path(config: fdl.Config[Any], item: str) -> str:
    """Apply `path=value`; returns the path.

    Raises:
        UsageError: no such path, a path to a part and not to a value, or a value of another type.
    """
    path, text = item.split("=", 1)
    said = f"--config={item}"
    place = find(config, path, said)
    _refuse_part(place, said)
    place.put(parse_value(text, place.wanted, said))
    return path


def _refuse_part(place: Place, said: str) -> None:
    is_value = isinstance(place.value, dict) and not any(
        isinstance(item, (fdl.Buildable, dict)) for item in cast(dict[str, Any], place.value).values()
    )
    if place.is_part and not is_value:
        inner = ", ".join(f"{place.path}.{name}" for name in children(place.value))
        raise UsageError(f"{said}: {place.path} is a part, not a value. Set one of its values: {inner}.")


def set_value(config: fdl.Config[Any], path: str, value: Any, said: str) -> None:
    """Set what stands at `path` to a Python value, or to a config (which is copied); `said` begins the error.

    Raises:
        UsageError: as for `set_path`.
    """
    place = find(config, path, said)
    if isinstance(value, fdl.Buildable):
        made = fdl.get_callable(value).__name__
        if not is_of_type(value, place.wanted):
            raise UsageError(f"{said}: got a {made}, wanted {shown_type(place.wanted)}.")
        fitted: Any = value.__deepcopy__({})
    else:
        _refuse_part(place, said)
        fitted = _fitted(value, place.wanted, said, value)
        if isinstance(fitted, (int, float)) and not isinstance(fitted, bool) and _takes(place.wanted, float):
            fitted = float(fitted) + 0.0  # 1 as 1.0 and -0.0 as 0.0: equal values make equal records
    _refuse_what_no_record_holds(place._replace(value=fitted), said)
    place.put(fitted)


def _refuse_what_no_record_holds(place: Place, where: str) -> None:
    """An object that stands where its config should, a function without a name of its own, code of other packages."""
    if place.is_part:
        made = fdl.get_callable(place.value)
        policy = OurPartsOnly()
        if not (policy.allows_import(made.__module__, made.__qualname__) and policy.allows_value(made)):
            raise UsageError(
                f"{where}: {place.path}: {made.__name__} stands in {made.__module__}, from which no record of "
                "a run is loaded. Let it stand in a file of experiments/, or in FILE.py of --config=FILE.py:NAME."
            )
        return
    try:
        serialization.dump_json(fdl.Config(dict, value=place.value), pyref_policy=OurPartsOnly())
    except Exception as error:
        values = place.value if isinstance(place.value, (tuple, list)) else [place.value]
        if any(callable(value) for value in values):
            wanted = "functions that stand in a file of experiments/ under names of their own"
        elif all(isinstance(value, float) for value in values):
            wanted = f"Python's own numbers, {_plain(place.value)!r}"
        else:
            wanted = f"its config, fdl.Config({type(place.value).__name__}, …)"
        raise UsageError(
            f"{where}: {place.path}: got {place.value!r}, which no record of a run can hold; wanted {wanted}."
        ) from error


def check_values(config: fdl.Config[Any], *, recorded: bool) -> None:
    """Refuse values of another type than the annotation, and values that nobody has set; where the config is to be
    `recorded`, also what no record holds.

    Raises:
        UsageError: with the file and line that set it.
    """
    for place in walk(config):
        if place.value is fdl.NO_VALUE:
            raise UsageError(f"{place.path}: not set, and has no default; wanted {shown_type(place.wanted)}. Set it.")
        if not place.is_set or isinstance(place.value, dict):
            continue
        if is_of_type(place.value, place.wanted):
            if recorded:
                _refuse_what_no_record_holds(place, place.set_at())
            continue
        made = fdl.get_callable(place.value).__name__ if place.is_part else repr(place.value)
        raise UsageError(f"{place.set_at()}: {place.path}: got {made}, wanted {shown_type(place.wanted)}.")
