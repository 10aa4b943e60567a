"""Frozen records (`config.json`), which may come from anybody: loaded without running any code of theirs.

text → JSON → `_count_unfolded`, which refuses calls during loading and endless values → Fiddle, which imports only what
`RecordImportPolicy` allows → a check that the parts take these arguments

Only a training that starts from a record runs the texts of user files in it (`with_code`).
"""

import functools
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import fiddle as fdl
from fiddle.experimental import serialization

from experiments.config import user_code, user_files
from experiments.config.paths import check_values, walk
from experiments.config.record_policy import PLAIN_TYPES, RecordImportPolicy
from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, read_text
from kd_core.json_fields import LARGEST

MOST_BYTES = 1 << 22
MOST_VALUES = 100_000
# Settings that are loaded from a record with user files when these files do not run.
SETTINGS_WITHOUT_CODE = [f"Attr(name='{name}')" for name in ("student", "shards", "checkpoint")]
WANTED = "the config.json of a run"
# Settings that earlier versions wrote, by their class. They mean nothing any more, and are left out.
REMOVED_SETTINGS = {"Shards": ("shuffle_shards",)}


def load_record(path: Path, *, with_code: bool = False) -> fdl.Config[Any]:
    """Loads a frozen config.

    User files in the record run first with `with_code`. Without it, only `SETTINGS_WITHOUT_CODE` are then loaded.

    Raises:
        UsageError: the record is missing, damaged, or names code that no record may name.
    """
    text = read_text(path, WANTED, MOST_BYTES)
    try:
        value = json.loads(text)
        _take_user_files(value, path, with_code)
        # Refuse zero characters, and surrogates that no UTF-8 holds (`encode` raises).
        if "\\u0000" in json.dumps(value) or not json.dumps(value, ensure_ascii=False).encode():
            raise ValueError("a text that is none: a zero character")
        if _count_unfolded(value["root"], value["objects"], {}) > MOST_VALUES:
            raise ValueError(f"unfolds to more than {MOST_VALUES} values")
        config: Any = serialization.load_json(json.dumps(value), pyref_policy=RecordImportPolicy())
        if not isinstance(config, fdl.Config):
            raise TypeError(f"holds a {type(config).__name__}")
        for place in list(walk(config)):
            _remove_earlier_settings(place.node)
            _refuse_unknown_arguments(place.node)
    except UsageError:
        raise
    except serialization.PyrefPolicyError as error:
        raise UsageError(f"{path}: {_refusal_text(error)}") from None
    except Exception as error:  # a record of another version may fail in any way
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UsageError(
            f"{path}: not a record of version {version('kd-workspace')} ({problem}). The attempts/ of its run name the "
            "commit that wrote it: go on with that one, or start the run anew."
        ) from None
    return cast(fdl.Config[Any], config)


def _take_user_files(value: dict[str, Any], path: Path, with_code: bool) -> None:
    """Removes the user files from a record and runs them.

    Without `with_code` they do not run, and all settings but `SETTINGS_WITHOUT_CODE` are removed too.
    """
    files = user_files.parse_user_files(value.pop("user_files", []), str(path))
    for file in files if with_code else ():
        user_code.run_guarded(functools.partial(user_files.load, file), str(path))
    if files and not with_code:
        root = value["objects"][value["root"]["key"]]
        root["items"] = [item for item in root["items"] if item[0] in SETTINGS_WITHOUT_CODE]


def keeps_code(path: Path) -> bool:
    """Checks whether a record keeps user files."""
    with damage_as_usage_error(path, WANTED):
        return bool(json.loads(read_text(path, WANTED, MOST_BYTES)).get("user_files"))


def _refusal_text(error: serialization.PyrefPolicyError) -> str:
    symbol = f"{error.symbol!a} of {error.module!a}"
    if error.module.startswith(f"{user_files.PACKAGE}."):
        return f"its student is made by {symbol}, code that only training runs from a record. Take the run's export/."
    return f"names {symbol}, which no experiment is made of, so it was not loaded. Take one that launchers.train wrote."


def _count_unfolded(value: Any, objects: dict[str, Any], counts: dict[str, float]) -> float:
    """Counts a record's values with shared ones written out at every use. It is infinite where a value holds itself.

    Raises:
        ValueError: loading would call a class with arguments, or a number is too large for any setting.
    """
    if isinstance(value, list):
        return 1 + sum(_count_unfolded(item, objects, counts) for item in cast(list[Any], value))
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError(f"a number of {value.bit_length()} bits")
    if not isinstance(value, dict):
        return 1
    node = cast(dict[str, Any], value)
    if node["type"] == "ref":
        key = node["key"]
        if key not in counts:
            counts[key] = math.inf  # until it is counted: a value that holds itself stays infinite
            counts[key] = _count_unfolded(objects[key], objects, counts)
        return counts[key]
    if node["type"] in ("pyref", "leaf"):
        return 1 + _count_unfolded(node.get("value"), objects, counts)
    kind = {name: node["type"].get(name) for name in ("type", "module", "name")}
    # Fiddle makes a named tuple by calling the class in its metadata, which must therefore be the node's own type.
    is_plain = kind["module"] in PLAIN_TYPES and kind["name"] != "BuildableTraverserMetadata"
    if not is_plain and node["metadata"] != kind:
        raise ValueError(f"{node['metadata']!a:.80} stands as the class of {kind['name']!a:.80}")
    return 1 + _count_unfolded(node["items"], objects, counts) + _count_unfolded(node["metadata"], objects, counts)


def _remove_earlier_settings(node: Any) -> None:
    if isinstance(node, fdl.Buildable):
        for name in REMOVED_SETTINGS.get(fdl.get_callable(node).__name__, ()):
            node.__arguments__.pop(name, None)


def _refuse_unknown_arguments(node: Any) -> None:
    if not isinstance(node, fdl.Buildable) or (signature := node.__signature_info__).has_var_keyword:
        return
    if unknown := sorted(set(map(str, node.__arguments__)) - set(signature.parameters)):
        raise TypeError(f"{fdl.get_callable(node).__name__} takes no {unknown[0]!a}")


def recorded_student(path: Path) -> Any:
    """Builds the start of the student of a record.

    Raises:
        UsageError: as for `load_record`, or the record holds no experiment, or values of wrong types.
    """
    config = load_record(path)
    if fdl.get_callable(config).__name__ != "Experiment":
        raise UsageError(f"{path}: holds a {fdl.get_callable(config).__name__}, wanted an Experiment.")
    check_values(config.student, recorded=False)
    return fdl.build(config.student)
