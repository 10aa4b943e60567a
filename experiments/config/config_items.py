"""`--config` items, applied in order to one Fiddle config.

    NAME  NAME(arg=v)            a base function of experiments/ (first item)
    FILE.py:NAME(arg=v)          a base function of a user's file (first item)
    config_file:F  run:RUN_DIR   a frozen record (first item)
    fiddler:NAME(arg=v)          a function that changes the config; also fiddler:FILE.py:NAME(arg=v)
    tag:NAME=value               all values with the tag, which must agree
    path=value                   one value; text needs no quotes

Fiddle's long forms `config:NAME` and `set:path=value` are accepted too. Names, paths and types are checked before
anything is built.
"""

import ast
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fiddle as fdl
from fiddle.experimental import serialization

from experiments.config import user_code, user_files
from experiments.config.catalog import FIDDLER, TAG, Entry, find_entry, nearest
from experiments.config.frozen_records import load_record
from experiments.config.paths import Place, check_values, parse_value, set_path, walk
from kd_core.errors import UsageError

BASE_PREFIXES = ("config:", "run:", "config_file:")
CHANGE_PREFIXES = ("set:", "fiddler:", "tag:")


@dataclass
class Resolved:
    """A config with the name of its run, the item that set each path, and the run folder that it repeats."""

    config: fdl.Config[Any]
    name: str
    set_by: dict[str, str] = field(default_factory=dict)
    repeats: Path | None = None

    def build(self) -> Any:
        """Builds what the config describes: an `Experiment`, or a `TeacherExport`."""
        return fdl.build(self.config)


def _parse_call(text: str, item: str) -> tuple[str, dict[str, Any]]:
    """Parses `NAME` or `NAME(arg=literal, …)` into the name and its arguments."""
    expected = "Wanted NAME, NAME(arg=value) or path=value."
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            if not call.args:
                return call.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
            first_argument = ast.unparse(call.args[0])
            expected = f"{first_argument} is an argument without a name. Wanted {call.func.id}(NAME={first_argument})."
    except (SyntaxError, ValueError):
        pass
    raise UsageError(f"--config={item}: cannot be read. {expected}")


def _find_function(text: str, item: str, kind: str, takes: str = "") -> tuple[Entry, dict[str, Any]]:
    """Returns the function that an item names, of `experiments/` or of a user's file, and its arguments."""
    if in_file := re.fullmatch(r"(?P<file>[^(]*\.py)(:(?P<call>.*))?", text, re.DOTALL):
        file, call = in_file["file"], in_file["call"]
        name, arguments = _parse_call(call, item) if call else ("", {})
        expected = "NAME of experiments/, or FILE.py:NAME"
        path = file if call is None else f"{file}:{name}"
        return user_code.load_from_file(path, f"--config={item}", expected, kind), arguments
    name, arguments = _parse_call(text, item)
    return find_entry(name, kind, takes), arguments


def _from_record(item: str, kind: str) -> Resolved:
    prefix, target = item.split(":", 1)
    target = str(Path(target).expanduser())
    folder = Path(target) if prefix == "run" else None
    config = load_record(folder / "config.json" if folder else Path(target), with_code=True)
    class_name = fdl.get_callable(config).__name__
    if class_name != kind:
        raise UsageError(f"--config={item}: holds a {class_name}, wanted a {kind}.")
    name = f"{Path(target).resolve().name}_again" if folder else Path(target).stem
    return Resolved(config, name, {place.path: f"--config={item}" for place in walk(config)}, folder)


def _is_change(item: str) -> bool:
    return item.startswith(CHANGE_PREFIXES) or "=" in item.split("(", maxsplit=1)[0]


def _refuse_unknown_prefix(item: str) -> None:
    prefix = re.match(r"\w+:", item)
    if prefix and prefix[0] not in (prefixes := (*BASE_PREFIXES, *CHANGE_PREFIXES)):
        suggestion = nearest(prefix[0], prefixes) or f"Known: {', '.join(prefixes)}."
        raise UsageError(f"--config={item}: unknown form {prefix[0]!r}. {suggestion}")


def _resolve_first(item: str, kind: str) -> Resolved:
    _refuse_unknown_prefix(item)
    if item.startswith(("run:", "config_file:")):
        return _from_record(item, kind)
    if _is_change(item):
        name = "quickstart_export" if kind == "TeacherExport" else "quickstart"
        raise UsageError(
            f"--config={item}: the first --config must name an experiment (--list shows them), as in "
            f"--config={name} --config={item}."
        )
    entry, arguments = _find_function(item.removeprefix("config:"), item, kind)
    return Resolved(user_code.base_config(entry, arguments, f"--config={item}"), entry.name)


def _places_by_path(config: fdl.Config[Any]) -> dict[str, Place]:
    return {place.path: place for place in walk(config)}


def value_text(place: Place) -> str:
    """Returns a value as `config.txt` shows it. A part is shown by the name of its class."""
    return (
        fdl.get_callable(place.value).__name__ if isinstance(place.value, fdl.Buildable) else stable_text(place.value)
    )


def stable_text(value: Any) -> str:
    """Returns a value as text that is the same in every process. A function is written by its name."""
    if isinstance(value, tuple):
        texts = [stable_text(item) for item in value]
        return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"
    return f"{value.__module__}.{value.__qualname__}" if inspect.isfunction(value) else repr(value)


def _apply_fiddler(resolved: Resolved, item: str) -> None:
    kind = fdl.get_callable(resolved.config).__name__
    entry, arguments = _find_function(item.removeprefix("fiddler:"), item, FIDDLER, kind)
    before = {path: value_text(place) for path, place in _places_by_path(resolved.config).items()}
    user_code.call(entry, arguments, f"--config={item}", resolved.config)
    for path, place in _places_by_path(resolved.config).items():
        if before.get(path) != value_text(place):
            resolved.set_by[path] = f"{place.set_at()}, --config={item}"


def items_by_path(resolved: Resolved) -> dict[str, str]:
    """Returns the items that set a value by its path or tag, by path. What a fiddler sets is not among them."""
    return {path: text for path, text in resolved.set_by.items() if text.startswith("--config=")}


def find_tagged(config: fdl.Config[Any], name: str, error_prefix: str) -> list[Place]:
    """Returns the places that carry a tag. `error_prefix` begins the message of an error.

    Raises:
        UsageError: there is no such tag, or no value of this config carries it.
    """
    tag = user_code.load(find_entry(name, TAG, error_prefix=error_prefix), error_prefix)
    places = [place for place in walk(config) if tag in place.tags]
    if not places:
        raise UsageError(f"{error_prefix}: no value of this experiment carries the tag. --print_config shows tags.")
    return places


def _apply_tag(resolved: Resolved, item: str) -> None:
    name, equals, text = item.removeprefix("tag:").partition("=")
    if not equals:
        raise UsageError(f"--config={item}: no value. Wanted tag:{name}=value.")
    for place in find_tagged(resolved.config, name, f"--config={item}"):
        place.put(parse_value(text, place.annotation, f"--config={item}: {place.path}"))
        resolved.set_by[place.path] = f"--config={item}"


def apply(resolved: Resolved, item: str) -> None:
    """Applies an item that names no experiment to the config, in place.

    Raises:
        UsageError: as for `resolve_items`.
    """
    _refuse_unknown_prefix(item)
    if not _is_change(item):
        raise UsageError(f"--config={item}: only the first --config names an experiment; wanted path=value.")
    if item.startswith("fiddler:"):
        _apply_fiddler(resolved, item)
    elif item.startswith("tag:"):
        _apply_tag(resolved, item)
    else:
        path = set_path(resolved.config, item.removeprefix("set:"))
        resolved.set_by[path] = f"--config={item}"


def resolve_items(items: Sequence[str], kind: str) -> Resolved:
    """Resolves all items into one config, with every value of its annotated type.

    Raises:
        UsageError: an item is wrong. The message names it and what would be right.
    """
    if not items:
        raise UsageError("no --config given. Name an experiment: --config=NAME (--list shows them).")
    resolved = _resolve_first(items[0], kind)
    for item in items[1:]:
        apply(resolved, item)
    expand_home(resolved)
    check_values(resolved.config, recorded=kind == "Experiment")
    return resolved


def expand_home(resolved: Resolved) -> None:
    """Expands the home folder in values that begin with `~/`."""
    for place in list(walk(resolved.config)):
        if isinstance(place.value, str) and place.value.startswith("~/"):
            resolved.set_by.setdefault(place.path, place.set_at())
            place.put(str(Path(place.value).expanduser()))


def freeze(config: fdl.Config[Any]) -> fdl.Config[Any]:
    """Returns a copy in which every default is an explicit value.

    A later change of a default then leaves the record as it is.
    """
    config = config.__deepcopy__({})
    for place in list(walk(config)):
        if isinstance(place.node, fdl.Buildable):
            place.put(place.value)
    return config


def _set_by_text(place: Place, set_by: dict[str, str]) -> str:
    tags = "".join(f", tag:{tag.name.rsplit('.', 1)[-1]}" for tag in place.tags)
    return " ".join(set_by.get(place.path, place.set_at()).split()) + tags  # an item may have line breaks


def describe(resolved: Resolved) -> str:
    """Returns the values of a config as lines: path = value, and what set it.

    Further lines hold the hash of each user file that the config has code of.
    """
    lines = [
        f"{place.path} = {value_text(place)}  # {_set_by_text(place, resolved.set_by)}"
        for place in walk(resolved.config)
        if not isinstance(place.value, dict)
    ]
    if user_files.loaded_modules():
        files = user_files.files_in(serialization.dump_json(resolved.config))
        lines += [
            f"code of {path} = {sha[:12]}  # {file.place}" for file in files for path, sha in file.hashes().items()
        ]
    return "\n".join(lines) + "\n"


def differences(base: Resolved, changed: Resolved) -> str:
    """Returns one line per value that differs between the two: path = value, the earlier value, and what set it."""
    before = {path: value_text(place) for path, place in _places_by_path(base.config).items()}
    after = _places_by_path(changed.config)
    lines = [
        f"{path} = {value_text(place)}  (was {before.get(path, 'absent')})  # {_set_by_text(place, changed.set_by)}"
        for path, place in after.items()
        if not isinstance(place.value, dict) and before.get(path) != value_text(place)
    ]
    lines += [f"{path} is absent  (was {value})" for path, value in before.items() if path not in after]
    return "".join(f"{line}\n" for line in lines)


def recorded_text(path: Path) -> str:
    """Describes the settings of a record, with today's defaults for settings that are newer than the record."""
    return describe(Resolved(load_record(path), path.name))


def record_json(config: fdl.Config[Any]) -> str:
    """Returns the frozen config as JSON, with the texts of the user files whose functions or classes it has."""
    text = serialization.dump_json(freeze(config), indent=2)
    if files := user_files.files_in(text):
        user_file_texts = [{"main": file.main, "texts": file.texts} for file in files]
        text = json.dumps({**json.loads(text), "user_files": user_file_texts}, indent=2)
    return text + "\n"
