"""Python files of the user's own, loaded from their text, so that a record can keep them and run them again.

FILE.py ─► its text, and those of files beside it that it imports ─► a module named by their hash ─► functions, classes

An edited file is thus another module. What a record keeps of it is enough to load it where the file is gone.
"""

import ast
import hashlib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from kd_core.errors import UsageError
from kd_core.json_fields import fields, items, text

PACKAGE = "user_files"
OURS = ("kd_core", "data", "experiments", "launchers", PACKAGE)
PLAIN_PATH = re.compile(r"(?:[^\W\d]\w*/)*[^\W\d]\w*\.py", re.ASCII)
MOST_CHARACTERS = 1 << 20  # of all texts; a record holds them


@dataclass(frozen=True)
class UserFile:
    """A file with the files beside it that it imports: texts by their paths in `place`, a folder or a record."""

    main: str
    texts: dict[str, str]
    place: str

    @property
    def module(self) -> str:
        """The main file's module: its name, and the hash of all texts."""
        digest = _hash(json.dumps([self.main, self.texts], sort_keys=True))
        name = re.sub(r"\W", "_", PurePosixPath(self.main).stem)
        return f"{PACKAGE}.{name}_{digest[:12]}"

    @property
    def path(self) -> str:
        """Path of the main file."""
        return f"{self.place}/{self.main}"

    def hashes(self) -> dict[str, str]:
        """Returns the sha256 of each text, by path."""
        return {path: _hash(each) for path, each in self.texts.items()}

    def modules(self) -> dict[str, str]:
        """Returns the path of the text behind each module."""
        beside = {_module_of(path): path for path in self.texts if path != self.main}
        return {self.module: self.main, **beside}


def _hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def _source(path: Path) -> str:
    return importlib.util.decode_source(path.read_bytes())


def source_hash(path: Path) -> str:
    """Returns the sha256 of a file's text, as `UserFile.hashes` has it."""
    return _hash(_source(path))


def _module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _Texts(MetaPathFinder, ExecutionLoader):
    """Serves the modules of user files from their texts."""

    def __init__(self) -> None:
        self.files: dict[str, UserFile] = {}

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in (PACKAGE, *self.files) else None

    def get_source(self, fullname: str) -> str:
        return "" if fullname == PACKAGE else self.files[fullname].texts[self._path(fullname)]

    def get_filename(self, fullname: str) -> str:
        return PACKAGE if fullname == PACKAGE else f"{self.files[fullname].place}/{self._path(fullname)}"

    def is_package(self, fullname: str) -> bool:
        return fullname == PACKAGE or self._path(fullname).endswith("/__init__.py")

    def _path(self, fullname: str) -> str:
        return self.files[fullname].modules()[fullname]


_texts = _Texts()


def known() -> frozenset[str]:
    """Returns the names of all modules of files that were loaded."""
    return frozenset(_texts.files)


def loaded() -> list[UserFile]:
    """Returns the files that were loaded, each once."""
    return list({file.module: file for file in _texts.files.values()}.values())


def holds(filename: str) -> bool:
    """Returns True for the file name of code that was loaded from a user's file."""
    return any(
        filename.startswith(f"{file.place}/") and filename[len(file.place) + 1 :] in file.texts for file in loaded()
    )


def load(file: UserFile) -> ModuleType:
    """Import a file.

    Raises:
        UsageError: a file beside it has the name of another one that is loaded.
        Exception: whatever its code raises.
    """
    for module, path in file.modules().items():
        other = _texts.files.get(module)
        if other is not None and other.texts[other.modules()[module]] != file.texts[path]:
            raise UsageError(f"{file.place}/{path}: another {path} is loaded, of {other.place}. Rename one of them.")
        _texts.files.setdefault(module, file)
    if _texts not in sys.meta_path:
        sys.meta_path.insert(0, _texts)
    return importlib.import_module(file.module)


def read(path: Path) -> UserFile:
    """Read a Python file, and the files beside it that it imports.

    Raises:
        UsageError: they have too many characters to be recorded.
        SyntaxError: one of them is no Python.
    """
    folder = path.absolute().parent
    texts, waiting = dict[str, str](), [path.name]
    while waiting:
        name = waiting.pop()
        if name in texts:
            continue
        texts[name] = _source(folder / name)
        waiting += _beside(folder, _imported(ast.parse(texts[name], str(folder / name))))
    if (size := sum(map(len, texts.values()))) > MOST_CHARACTERS:
        raise UsageError(f"{path}: has {size} characters with the files that it imports; a record keeps at most "
                         f"{MOST_CHARACTERS}. Install what is large as a package.")  # fmt: skip
    return UserFile(path.name, texts, str(folder))


def _imported(tree: ast.AST) -> set[str]:
    """Returns the top-level names that a file imports."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names}


def _beside(folder: Path, names: set[str]) -> list[str]:
    """Returns the files of modules that lie in the folder and are not installed."""
    found: list[Path] = []
    for name in sorted(names - {*OURS, *sys.stdlib_module_names}):
        package, module = folder / name / "__init__.py", folder / f"{name}.py"
        if (package.is_file() or module.is_file()) and _is_of(folder, name):
            found += sorted((folder / name).rglob("*.py")) if package.is_file() else [module]
    return [path.relative_to(folder).as_posix() for path in found]


def _is_of(folder: Path, name: str) -> bool:
    if name in known():
        return True
    spec = importlib.util.find_spec(name)
    return spec is None or spec.origin is None or Path(spec.origin).is_relative_to(folder)


def used(config_json: str) -> list[UserFile]:
    """Returns the files of which a graph has functions or classes."""
    names = set(re.findall(r'"module": "([\w.]+)"', config_json))
    files = {file.module: file for name in names if (file := _texts.files.get(name))}
    return [files[name] for name in sorted(files)]


def from_record(value: Any, place: str) -> list[UserFile]:
    """Read what a record keeps; errors as of `json_fields`."""
    found: list[UserFile] = []
    for each in items(value, "user_files"):
        main, texts = fields(each, "a user file", ("main", "texts"))["main"], fields(each["texts"], "texts")
        for path, content in texts.items():
            text(content, path)
            if path != main and (not PLAIN_PATH.fullmatch(path) or path.partition("/")[0].removesuffix(".py") in OURS):
                raise ValueError(f"{path!a:.80} is no file beside an experiment's")
        if text(main, "main") not in texts or "/" in main:
            raise ValueError(f"{main!a:.80} is no experiment's file")
        found.append(UserFile(main, texts, place))
    return found
