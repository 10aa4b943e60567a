"""What a command line can name: found by reading the files of `experiments/` as text, so that `--help` imports nothing.

A base function's kind is its return annotation (`fdl.Config[Experiment]`, `fdl.Config[TeacherExport]`), so is a
sweep's (`Sweep`); a fiddler takes such a config as its first parameter and returns None; a tag is a subclass of
`fdl.Tag`. A file that cannot be read as Python hides only its own names.
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
    """One name of `experiments/`; `takes` is the kind of config that a fiddler changes."""

    name: str
    module: str
    kind: str
    summary: str
    takes: str = ""
    arguments: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import it: a function, or a tag's class."""
        return getattr(importlib.import_module(self.module), self.name)


def _kind(annotation: ast.expr | None) -> str:
    """`Experiment` of `fdl.Config[Experiment]`, `Sweep` of `Sweep`, whatever module stands before a name, or quotes."""
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
    names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
    if (kind := _kind(node.returns)) in (*WORDS, SWEEP):
        return Entry(node.name, module, kind, summary, arguments=tuple(names))
    takes = _kind(node.args.args[0].annotation) if node.args.args else ""
    if takes and node.returns is not None and ast.unparse(node.returns) == "None":
        return Entry(node.name, module, FIDDLER, summary, takes, tuple(names[1:]))
    return None


def _files() -> list[Path]:
    """Returns the files of experiments/ but those of `config`, and copies that an editor keeps in hidden folders."""
    files = [path for path in sorted(FOLDER.rglob("*.py")) if not path.is_relative_to(FOLDER / "config")]
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(FOLDER).parts)]


def _parsed(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_bytes(), str(path)).body


def _read() -> tuple[list[Entry], list[str]]:
    """All entries by module and place in it; and what is wrong with files that cannot be read."""
    found: list[Entry] = []
    broken: list[str] = []
    for path in _files():
        module = ".".join(["experiments", *path.relative_to(FOLDER).with_suffix("").parts])
        try:
            nodes = _parsed(path)
        except (SyntaxError, ValueError) as error:
            at = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
            what = error.msg if isinstance(error, SyntaxError) else error
            broken.append(f"{path.relative_to(FOLDER.parent)}{at} cannot be read: {what}.")
            continue
        found += [entry for node in nodes if (entry := _entry(node, module))]
    return found, broken


def entries() -> list[Entry]:
    """All of them, by module and place in it."""
    return _read()[0]


def nearest(wrong: str, known: Iterable[str]) -> str:
    """`Did you mean …?` with the nearest known name, or nothing; large letters and small are the same."""
    names = {name.casefold(): name for name in sorted(known)}
    near = difflib.get_close_matches(wrong.casefold(), names, n=1, cutoff=0.5)
    return f"Did you mean {names[near[0]]!r}?" if near else ""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A closing sentence with the nearest known name, or with all of them."""
    names = sorted(known)
    return nearest(wrong, names) or f"Known: {', '.join(names) or 'none'}."


def find(name: str, kind: str, takes: str = "", said: str = "") -> Entry:
    """The entry of that name and kind; a fiddler also of what it takes. `said` begins the error.

    Raises:
        UsageError: there is none, or more than one; names the nearest.
    """
    everything, broken = _read()
    known = [entry for entry in everything if entry.kind == kind and entry.takes in ("", takes)]
    found = [entry for entry in known if entry.name == name]
    item = said or f"--config={PREFIXES.get(kind, '')}{name}"
    if len(found) > 1:
        places = " and ".join(entry.module for entry in found)
        raise UsageError(f"{item}: stands in {places}. Give one of them another name.")
    if found:
        return found[0]
    other = next((entry for entry in everything if entry.name == name), None)
    if other is not None:
        why = _not_here(other)
    else:
        why = _says_no_kind(name, kind) or " ".join([*broken, did_you_mean(name, (entry.name for entry in known))])
    raise UsageError(f"{item}: no such {WORDS.get(kind, (kind.lower(),))[0]} in experiments/. {why}")


def _says_no_kind(name: str, kind: str) -> str:
    """Where a function of that name stands that does not say what it gives; else nothing."""
    gives = {SWEEP: "Sweep", FIDDLER: "None, and a first parameter of fdl.Config[…]"}.get(kind, f"fdl.Config[{kind}]")
    for path in _files() if kind != TAG else ():
        with contextlib.suppress(SyntaxError, ValueError):
            for node in _parsed(path):
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    said = ast.unparse(node.returns) if node.returns else "nothing"
                    return (
                        f"{path.relative_to(FOLDER.parent)}:{node.lineno} has a function {name} that is annotated to "
                        f"return {said}; wanted -> {gives}."
                    )
    return ""


def _not_here(entry: Entry) -> str:
    """What a name is that was given where it does not belong."""
    if entry.kind in WORDS:
        what, command = WORDS[entry.kind]
        return f"It is an {what}: python -m {command} --config={entry.name}"
    if entry.kind == SWEEP:
        return f"It is a sweep: python -m launchers.sweep --sweep={entry.name}"
    if entry.takes:
        return f"It is a fiddler of an {WORDS[entry.takes][0]}: --config=fiddler:{entry.name}, after one."
    return f"It is a {entry.kind}: --config={PREFIXES.get(entry.kind, '')}{entry.name}=…, after an experiment."


def listing(kind: str) -> str:
    """Names with their first docstring lines, a line each, and files that cannot be read."""
    everything, broken = _read()
    shown = [entry for entry in everything if kind in (entry.kind, entry.takes)]
    shown += [entry for entry in everything if entry.kind == TAG and kind != SWEEP]
    shown.sort(key=lambda entry: (entry.kind == TAG, entry.kind == FIDDLER))
    names = [PREFIXES.get(entry.kind, "") + entry.name for entry in shown]
    width = max(map(len, names), default=0)
    places = [f"({entry.module}{'; takes ' if entry.arguments else ''}{', '.join(entry.arguments)})" for entry in shown]
    lines = [
        f"  {name:<{width}}  {entry.summary}  {place}" for name, entry, place in zip(names, shown, places, strict=True)
    ]
    return "\n".join([*lines, *(f"  {problem}" for problem in broken)])
