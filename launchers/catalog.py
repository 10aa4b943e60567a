"""What can be named on a command line: found by reading `experiments/*.py` as text, so that `--help` imports nothing.

A base function's kind is its return annotation (`fdl.Config[Experiment]`, `fdl.Config[TeacherExport]`), so is a
sweep's (`Sweep`); a fiddler takes such a config as its first parameter and returns None.
"""

import ast
import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_core.errors import UsageError

FOLDER = Path(__file__).parent.parent / "experiments"
FIDDLER, SWEEP = "fiddler", "Sweep"


@dataclass(frozen=True)
class Entry:
    """One function of `experiments/` that a command line can name."""

    name: str
    module: str
    kind: str
    summary: str

    def function(self) -> Callable[..., Any]:
        """Import it."""
        return getattr(importlib.import_module(self.module), self.name)


def _kind(function: ast.FunctionDef) -> str | None:
    returns = ast.unparse(function.returns) if function.returns else ""
    if returns.startswith("fdl.Config["):
        return returns.removeprefix("fdl.Config[").removesuffix("]")
    if returns == SWEEP:
        return SWEEP
    first = function.args.args[0].annotation if function.args.args else None
    if returns == "None" and first is not None and ast.unparse(first).startswith("fdl.Config["):
        return FIDDLER
    return None


def entries() -> list[Entry]:
    """All of them, by module and place in it."""
    found: list[Entry] = []
    for path in sorted(FOLDER.rglob("*.py")):
        module = ".".join(["experiments", *path.relative_to(FOLDER).with_suffix("").parts])
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and (kind := _kind(node)):
                summary = (ast.get_docstring(node) or "").split("\n", 1)[0]
                found.append(Entry(node.name, module, kind, summary))
    return found


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A closing sentence with the nearest known name, or with all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}."


def find(name: str, kind: str) -> Entry:
    """The entry of that name and kind.

    Raises:
        UsageError: there is none; names the nearest.
    """
    of_kind = {entry.name: entry for entry in entries() if entry.kind == kind}
    if name not in of_kind:
        what = "fiddler" if kind == FIDDLER else "experiment" if kind == "Experiment" else "export"
        raise UsageError(f"--config={name}: no such {what} in experiments/. {did_you_mean(name, of_kind)}")
    return of_kind[name]


def listing(kind: str) -> str:
    """Names with their first docstring lines, a line each."""
    shown = [entry for entry in entries() if entry.kind in (kind, FIDDLER)]
    width = max((len(entry.name) for entry in shown), default=0)
    return "\n".join(
        f"  {('fiddler:' if e.kind == FIDDLER else '') + e.name:<{width}}  {e.summary}  ({e.module})" for e in shown
    )
