"""The policy of what a frozen record may name, which somebody else may have written."""

import inspect
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import fiddle as fdl
from fiddle.experimental import serialization

from experiments.config import user_files

OUR_PACKAGES = ("kd_core.", "data.", "experiments.")
# Of these packages, records may name dataclasses and tags, and any class or function of `experiments/` outside
# `CLASSES_ONLY`. Nothing of `FORBIDDEN`, which loads the records, may be named in one.
CLASSES_ONLY, FORBIDDEN = "experiments.base.", "experiments.config."
PLAIN_TYPES = {
    "builtins": ("dict", "frozenset", "list", "set", "tuple"),
    "fiddle._src.config": ("BuildableTraverserMetadata", "Config"),
}


class RecordImportPolicy(serialization.DefaultPyrefPolicy):
    """Import policy for records: the classes that experiments are made of, and what users' files define.

    Loading a record imports what it names, and building it calls that with any arguments. Other functions of our
    packages are therefore refused, and so are names that our modules import from elsewhere. Users' files are those of
    `experiments/`, and those that `--config=FILE.py:NAME` has loaded.
    """

    def allows_import(self, module: str, symbol: str) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Allows one plain name of our packages. A dotted name could lead into another module."""
        if module in PLAIN_TYPES:
            return symbol in PLAIN_TYPES[module]
        is_ours = f"{module}.".startswith(OUR_PACKAGES) and not f"{module}.".startswith(FORBIDDEN)
        return (is_ours or module in user_files.loaded_modules()) and symbol.isidentifier()

    def allows_value(self, value: Any) -> bool:
        """Allows a dataclass, a tag, or a class or function that a user's file defines."""
        module = str(getattr(value, "__module__", ""))
        if module in PLAIN_TYPES:
            return value.__name__ in PLAIN_TYPES[module]
        is_users = module in user_files.loaded_modules()
        if not is_users and (not f"{module}.".startswith(OUR_PACKAGES) or f"{module}.".startswith(FORBIDDEN)):
            return False
        if is_users or (module.startswith("experiments.") and not f"{module}.".startswith(CLASSES_ONLY)):
            return inspect.isclass(value) or inspect.isfunction(value)
        return inspect.isclass(value) and (is_dataclass(value) or issubclass(value, (fdl.Tag, Enum, tuple)))
