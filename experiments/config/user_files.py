"""Python files of users, loaded from their text, so that a record can keep them and run them again.

FILE.py ─► its text, and those of files beside it that it imports ─► a module named by their hash ─► functions, classes

An edited file is therefore another module. A record keeps enough of a file to load it where the file is gone.
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
from kd_core.json_fields import check_list, check_object, check_text

PACKAGE = "user_files"
OURS = ("kd_core", "data", "experiments", "launchers", PACKAGE)
PLAIN_PATH = re.compile(r"(?:[^\W\d]\w*/)*[^\W\d]\w*\.py", re.ASCII)
MOST_CHARACTERS = 1 << 20  # of all texts together, since a record holds them


@dataclass(frozen=True)
class UserFile:
    """A file with the files beside it that it imports. `texts` are keyed by path in `place`, a folder or a record."""

    main: str
    texts: dict[str, str]
    place: str

    @property
    def module(self) -> str:
        """Returns the name of the main file's module, with a hash of all texts in it."""
        digest = _hash(json.dumps([self.main, self.texts], sort_keys=True))
        name = re.sub(r"\W", "_", PurePosixPath(self.main).stem)
        return f"{PACKAGE}.{name}_{digest[:12]}"

    @property
    def path(self) -> str:
        """Returns the path of the main file."""
        return f"{self.place}/{self.main}"

    def hashes(self) -> dict[str, str]:
        """Returns the sha256 of each text, by path."""
        return {path: _hash(content) for path, content in self.texts.items()}

    def modules(self) -> dict[str, str]:
        """Returns the path of the text behind each module, by module name."""
        beside = {_module_of(path): path for path in self.texts if path != self.main}
        return {self.module: self.main, **beside}


def _hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def _source(path: Path) -> str:
    return importlib.util.decode_source(path.read_bytes())


def source_hash(path: Path) -> str:
    """Returns the sha256 of a file's text, as in `UserFile.hashes`."""
    return _hash(_source(path))


def _module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _TextImporter(MetaPathFinder, ExecutionLoader):
    """Import hook that serves the modules of user files from their texts."""

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


_importer = _TextImporter()


def loaded_modules() -> frozenset[str]:
    """Returns the names of all modules of loaded files."""
    return frozenset(_importer.files)


def loaded_files() -> list[UserFile]:
    """Returns the loaded files, each once."""
    return list({file.module: file for file in _importer.files.values()}.values())


def is_user_file(filename: str) -> bool:
    """Checks whether a code object's file name is that of a loaded user file."""
    return any(
        filename.startswith(f"{file.place}/") and filename[len(file.place) + 1 :] in file.texts
        for file in loaded_files()
    )


def load(file: UserFile) -> ModuleType:
    """Imports a file and returns its module.

    Raises:
        UsageError: a file beside it has the name of another one that is loaded.
        Exception: whatever its code raises.
    """
    for module, path in file.modules().items():
        earlier = _importer.files.get(module)
        if earlier is not None and earlier.texts[earlier.modules()[module]] != file.texts[path]:
            raise UsageError(f"{file.place}/{path}: another {path} is loaded, of {earlier.place}. Rename one of them.")
        _importer.files.setdefault(module, file)
    if _importer not in sys.meta_path:
        sys.meta_path.insert(0, _importer)
    return importlib.import_module(file.module)


def read(path: Path) -> UserFile:
    """Reads a Python file and the files beside it that it imports.

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
    """Returns the files of those modules that lie in the folder and are not installed."""
    paths: list[Path] = []
    for name in sorted(names - {*OURS, *sys.stdlib_module_names}):
        package, module = folder / name / "__init__.py", folder / f"{name}.py"
        if (package.is_file() or module.is_file()) and _is_imported_from(folder, name):
            paths += sorted((folder / name).rglob("*.py")) if package.is_file() else [module]
    return [path.relative_to(folder).as_posix() for path in paths]


def _is_imported_from(folder: Path, name: str) -> bool:
    """Checks whether an import of the name is served from the folder."""
    if name in loaded_modules():
        return True
    spec = importlib.util.find_spec(name)
    return spec is None or spec.origin is None or Path(spec.origin).is_relative_to(folder)


def files_in(config_json: str) -> list[UserFile]:
    """Returns the loaded files whose functions or classes a config contains."""
    names = set(re.findall(r'"module": "([\w.]+)"', config_json))
    files = {file.module: file for name in names if (file := _importer.files.get(name))}
    return [files[name] for name in sorted(files)]


def parse_user_files(value: Any, place: str) -> list[UserFile]:
    """Reads the user files of a record.

    Raises:
        ValueError: a path is not one that a user file may have. Other errors are those of `json_fields`.
    """
    files: list[UserFile] = []
    for entry in check_list(value, "user_files"):
        main, texts = (
            check_object(entry, "a user file", ("main", "texts"))["main"],
            check_object(entry["texts"], "texts"),
        )
        for path, content in texts.items():
            check_text(content, path)
            if path != main and (not PLAIN_PATH.fullmatch(path) or path.partition("/")[0].removesuffix(".py") in OURS):
                raise ValueError(f"{path!a:.80} is not a file beside an experiment's")
        if check_text(main, "main") not in texts or "/" in main:
            raise ValueError(f"{main!a:.80} is no experiment's file")
        files.append(UserFile(main, texts, place))
    return files
