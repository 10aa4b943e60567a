"""Names that a command line can use, found by parsing the files of `experiments/`, so that `--help` imports nothing.

A base function's kind is its return annotation: `fdl.Config[Experiment]` or `fdl.Config[TeacherExport]`. A sweep's is
`Sweep`. A fiddler takes such a config as its first parameter and returns None. A tag is a subclass of `fdl.Tag`.
A file that cannot be parsed hides only its own names.
"""

import ast
import contextlib
import difflib
import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_core.errors import UsageError

FOLDER = Path(__file__).parent.parent
FIDDLER, TAG, SWEEP = "fiddler", "tag", "Sweep"
PREFIXES = {FIDDLER: "fiddler:", TAG: "tag:"}
WORDS = {"Experiment": ("experiment", "launchers.train"), "TeacherExport": ("export", "launchers.export_teacher")}


@dataclass(frozen=True)
class Entry:
    """A public function or tag of `experiments/`. `takes` is the kind of config that a fiddler changes."""

    name: str
    module: str
    kind: str
    summary: str
    takes: str = ""
    arguments: tuple[str, ...] = ()

    def load(self) -> Any:
        """Imports the module and returns the function, or the tag's class."""
        return getattr(importlib.import_module(self.module), self.name)


def _kind(annotation: ast.expr | None) -> str:
    """Returns `Experiment` for `fdl.Config[Experiment]` and `Sweep` for `Sweep`, also quoted or with a module name."""
    text = ast.unparse(annotation).strip("'") if annotation else ""
    config = re.fullmatch(r"(?:\w+\.)*Config\[(?:\w+\.)*(\w+)\]", text)
    return config[1] if config else SWEEP if text.rpartition(".")[2] == SWEEP else ""


def _entry(node: ast.stmt, module: str) -> Entry | None:
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
        return None
    summary = (ast.get_docstring(node) or "").split("\n", 1)[0]
    if isinstance(node, ast.ClassDef):
        is_tag = "fdl.Tag" in [ast.unparse(base) for base in node.bases]
        return Entry(node.name, module, TAG, summary) if is_tag else None
    names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    if (kind := _kind(node.returns)) in (*WORDS, SWEEP):
        return Entry(node.name, module, kind, summary, arguments=tuple(names))
    takes = _kind(node.args.args[0].annotation) if node.args.args else ""
    if takes and node.returns is not None and ast.unparse(node.returns) == "None":
        return Entry(node.name, module, FIDDLER, summary, takes, tuple(names[1:]))
    return None


def _files() -> list[Path]:
    """Returns the files of `experiments/` without those of `config` and copies that editors keep in hidden folders."""
    files = [path for path in sorted(FOLDER.rglob("*.py")) if not path.is_relative_to(FOLDER / "config")]
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(FOLDER).parts)]


def _parse(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_bytes(), str(path)).body


def _read() -> tuple[list[Entry], list[str]]:
    """Returns all entries by module and line, and one message per file that cannot be parsed."""
    entries_read: list[Entry] = []
    broken: list[str] = []
    for path in _files():
        module = ".".join(["experiments", *path.relative_to(FOLDER).with_suffix("").parts])
        try:
            nodes = _parse(path)
        except (SyntaxError, ValueError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
            problem = error.msg if isinstance(error, SyntaxError) else error
            broken.append(f"{path.relative_to(FOLDER.parent)}{line} cannot be read: {problem}.")
            continue
        entries_read += [entry for node in nodes if (entry := _entry(node, module))]
    return entries_read, broken


def entries() -> list[Entry]:
    """Returns all entries by module and line."""
    return _read()[0]


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns `Did you mean …?` with the most similar choice in any case, or an empty text if none is similar."""
    by_casefold = {choice.casefold(): choice for choice in sorted(choices)}
    matches = difflib.get_close_matches(name.casefold(), by_casefold, n=1, cutoff=0.5)
    return f"Did you mean {by_casefold[matches[0]]!r}?" if matches else ""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns a closing sentence with the most similar choice, or with all choices."""
    names = sorted(choices)
    return nearest(name, names) or f"Known: {', '.join(names) or 'none'}."


def find_entry(name: str, kind: str, takes: str = "", error_prefix: str = "") -> Entry:
    """Returns the entry of that name and kind. A fiddler must also take that kind of config.

    `error_prefix` begins the message of an error.

    Raises:
        UsageError: there is none, or more than one. The message names the nearest.
    """
    all_entries, broken = _read()
    candidates = [entry for entry in all_entries if entry.kind == kind and entry.takes in ("", takes)]
    matches = [entry for entry in candidates if entry.name == name]
    error_prefix = error_prefix or f"--config={PREFIXES.get(kind, '')}{name}"
    if len(matches) > 1:
        places = " and ".join(entry.module for entry in matches)
        raise UsageError(f"{error_prefix}: stands in {places}. Give one of them another name.")
    if matches:
        return matches[0]
    namesake = next((entry for entry in all_entries if entry.name == name), None)
    if namesake is not None:
        reason = _correct_use(namesake)
    else:
        reason = _unannotated_function(name, kind) or " ".join(
            [*broken, did_you_mean(name, (entry.name for entry in candidates))]
        )
    raise UsageError(f"{error_prefix}: no such {WORDS.get(kind, (kind.lower(),))[0]} in experiments/. {reason}")


def _unannotated_function(name: str, kind: str) -> str:
    """Returns where a function of that name lacks the annotation of its kind, or an empty text."""
    hint = {SWEEP: "Sweep", FIDDLER: "None, and a first parameter of fdl.Config[…]"}.get(kind, f"fdl.Config[{kind}]")
    for path in _files() if kind != TAG else ():
        with contextlib.suppress(SyntaxError, ValueError):
            for node in _parse(path):
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    annotation = ast.unparse(node.returns) if node.returns else "nothing"
                    return (
                        f"{path.relative_to(FOLDER.parent)}:{node.lineno} has a function {name} that is annotated to "
                        f"return {annotation}; wanted -> {hint}."
                    )
    return ""


def _correct_use(entry: Entry) -> str:
    """Returns how an entry of another kind is used."""
    if entry.kind in WORDS:
        noun, command = WORDS[entry.kind]
        return f"It is an {noun}: python -m {command} --config={entry.name}"
    if entry.kind == SWEEP:
        return f"It is a sweep: python -m launchers.sweep --sweep={entry.name}"
    if entry.takes:
        return f"It is a fiddler of an {WORDS[entry.takes][0]}: --config=fiddler:{entry.name}, after one."
    return f"It is a {entry.kind}: --config={PREFIXES.get(entry.kind, '')}{entry.name}=…, after an experiment."


def format_listing(kind: str) -> str:
    """Returns a line per name with the first line of its docstring, and one per file that cannot be parsed."""
    all_entries, broken = _read()
    shown = [entry for entry in all_entries if kind in (entry.kind, entry.takes)]
    shown += [entry for entry in all_entries if entry.kind == TAG and kind != SWEEP]
    shown.sort(key=lambda entry: (entry.kind == TAG, entry.kind == FIDDLER))
    names = [PREFIXES.get(entry.kind, "") + entry.name for entry in shown]
    width = max(map(len, names), default=0)
    places = [f"({entry.module}{'; takes ' if entry.arguments else ''}{', '.join(entry.arguments)})" for entry in shown]
    lines = [
        f"  {name:<{width}}  {entry.summary}  {place}" for name, entry, place in zip(names, shown, places, strict=True)
    ]
    return "\n".join([*lines, *(f"  {problem}" for problem in broken)])
