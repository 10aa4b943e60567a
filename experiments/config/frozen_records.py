"""Frozen records (`config.json`), which somebody else may have written: loaded without running anything in them.

text → JSON → `_unfolded`: no calls while it is loaded, no end that never comes → Fiddle, which imports what
`OurPartsOnly` lets in → arguments that the parts have

Only a training that is started from a record runs the texts of user files that the record keeps (`with_code`).
"""

import functools
import json
import math
from pathlib import Path
from typing import Any, cast

import fiddle as fdl
from fiddle.experimental import serialization

from experiments.config import user_code, user_files
from experiments.config.paths import PLAIN, OurPartsOnly, check_values, walk
from kd_core.errors import UsageError
from kd_core.files import damaged, read_text
from kd_core.json_fields import LARGEST

MOST_BYTES = 1 << 22
MOST_VALUES = 100_000
# What is read of a record that keeps user files, where they are not run.
WITHOUT_CODE = [f"Attr(name='{name}')" for name in ("student", "shards", "checkpoint")]
WANTED = "the config.json of a run"


def load_record(path: Path, *, with_code: bool = False) -> fdl.Config[Any]:
    """Read a frozen config. Where it keeps user files, they are run first, or only `WITHOUT_CODE` is read.

    Raises:
        UsageError: missing, damaged, or naming code that no record may name.
    """
    text = read_text(path, WANTED, MOST_BYTES)
    try:
        value = json.loads(text)
        _take_user_files(value, path, with_code)
        if "\\u0000" in json.dumps(value) or not json.dumps(value, ensure_ascii=False).encode():
            raise ValueError("a text that is none: a zero character")
        if _unfolded(value["root"], value["objects"], {}) > MOST_VALUES:
            raise ValueError(f"unfolds to more than {MOST_VALUES} values")
        config: Any = serialization.load_json(json.dumps(value), pyref_policy=OurPartsOnly())
        if not isinstance(config, fdl.Config):
            raise TypeError(f"holds a {type(config).__name__}")
        for place in walk(config):
            _refuse_foreign_arguments(place.node)
    except UsageError:
        raise
    except serialization.PyrefPolicyError as error:
        raise UsageError(f"{path}: {_refused(error)}") from None
    except Exception as error:  # a record of another version fails in as many ways as there are versions
        found = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UsageError(
            f"{path}: not a record of this version's experiments ({found}). Take one that launchers.train wrote."
        ) from None
    return cast(fdl.Config[Any], config)


def _take_user_files(value: dict[str, Any], path: Path, with_code: bool) -> None:
    """Take the user files out of a record, and run them. Else all but `WITHOUT_CODE` goes too."""
    kept = user_files.from_record(value.pop("user_files", []), str(path))
    for file in kept if with_code else ():
        user_code.guarded(functools.partial(user_files.load, file), str(path))
    if kept and not with_code:
        root = value["objects"][value["root"]["key"]]
        root["items"] = [item for item in root["items"] if item[0] in WITHOUT_CODE]


def keeps_code(path: Path) -> bool:
    """Checks whether a record keeps user files."""
    with damaged(path, WANTED):
        return bool(json.loads(read_text(path, WANTED, MOST_BYTES)).get("user_files"))


def _refused(error: serialization.PyrefPolicyError) -> str:
    named = f"{error.symbol!a} of {error.module!a}"
    if error.module.startswith(f"{user_files.PACKAGE}."):
        return f"its student is made by {named}, code that only training runs from a record. Take the run's export/."
    return f"names {named}, which no experiment is made of, so it was not loaded. Take one that launchers.train wrote."


def _unfolded(value: Any, objects: dict[str, Any], known: dict[str, float]) -> float:
    """Counts a record's values once what is shared is written out: infinitely many where it holds itself.

    Raises:
        ValueError: loading would call a class with arguments, or a number has no place in any setting.
    """
    if isinstance(value, list):
        return 1 + sum(_unfolded(each, objects, known) for each in cast(list[Any], value))
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError(f"a number of {value.bit_length()} bits")
    if not isinstance(value, dict):
        return 1
    found = cast(dict[str, Any], value)
    if found["type"] == "ref":
        key = found["key"]
        if key not in known:
            known[key] = math.inf
            known[key] = _unfolded(objects[key], objects, known)
        return known[key]
    if found["type"] in ("pyref", "leaf"):
        return 1 + _unfolded(found.get("value"), objects, known)
    kind = {name: found["type"].get(name) for name in ("type", "module", "name")}
    # Fiddle makes a named tuple by calling what stands as its metadata, which so must be its own type.
    is_plain = kind["module"] in PLAIN and kind["name"] != "BuildableTraverserMetadata"
    if not is_plain and found["metadata"] != kind:
        raise ValueError(f"{found['metadata']!a:.80} stands as the class of {kind['name']!a:.80}")
    return 1 + _unfolded(found["items"], objects, known) + (_unfolded(found["metadata"], objects, known))


def _refuse_foreign_arguments(node: Any) -> None:
    if not isinstance(node, fdl.Buildable) or (has := node.__signature_info__).has_var_keyword:
        return
    if unknown := sorted(set(map(str, node.__arguments__)) - set(has.parameters)):
        raise TypeError(f"{fdl.get_callable(node).__name__} takes no {unknown[0]!a}")


def recorded_student(path: Path) -> Any:
    """Build the start of the student of a record.

    Raises:
        UsageError: as for `load_record`, or the record is of no experiment, or has values that none takes.
    """
    config = load_record(path)
    if fdl.get_callable(config).__name__ != "Experiment":
        raise UsageError(f"{path}: holds a {fdl.get_callable(config).__name__}, wanted an Experiment.")
    check_values(config.student, recorded=False)
    return fdl.build(config.student)
