"""Measures prose and names as a linter would: `python -m tests.style [--list] [FILE …]`, part of `make check`.

It counts what can be counted of how the code reads, over the four packages, and fails where a figure misses its bar.
With files it prints every place of them that counts against a bar; `--list` does so for all.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGES = ("kd_core", "data", "experiments", "launchers")
NUMERICAL = (
    "kd_core/losses/", "kd_core/students/decoder/", "kd_core/parallel/parallelize.py", "kd_core/training/step.py",
    "kd_core/training/monitoring/histograms.py", "data/cache/codec/", "data/cache/alignment.py",
    "data/teacher/select.py", "data/stream/collate.py", "data/stream/order.py", "data/stream/packing.py",
)  # fmt: skip
# No verb begins so, though it may end in s.
NO_VERB = re.compile(r"(this|its|his|whose|as|others|ones|means of|sums|as well)$")
# They say nothing of what a variable holds.
EMPTY_NAMES = re.compile(
    r"_*(found|each|own|said|wanted|known|kept|this|at|what|that|there|here|things?|given|others)$"
)
LONGEST_SENTENCE = 30
Docstring = tuple[ast.AST, str, int]


class Count(NamedTuple):
    """Places that count against a bar, out of `total`."""

    places: list[str]
    total: float


def _docstrings(tree: ast.AST) -> Iterator[Docstring]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node, text, getattr(node, "lineno", 1)


def _begins_with_verb(text: str) -> bool:
    """Accepts the third person: `Returns`, `Raises`, `Does`."""
    word = re.match(r"[A-Za-z]+", text)
    return bool(word) and bool(re.search(r"[^s]s$", word[0])) and not NO_VERB.match(word[0].lower())


def _prose(text: str) -> str:
    """Returns the running text: no code, drawings, or argument lists."""
    lines = text.split("\n")
    kept = [line for line in lines if not re.match(r"\s{4,}|\s*[-|#>$]|.*(──|►|-->)|\s*\w+:\s*$", line)]
    return re.sub(r"`[^`]*`", "code", "\n".join(kept))


def _sentences(text: str) -> list[str]:
    return [" ".join(each.split()) for each in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text) if each.split()]


def _bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node.lineno


def _comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return sum(not re.match(r"#\s*(noqa|pyright|fmt|type:)", each) for each in comments)


def measure(files: list[Path]) -> dict[str, Count]:
    """Returns the counts by the name of the bar."""
    counts = {name: Count([], 0) for name in BARS}

    def add(name: str, total: float, *places: str) -> None:
        counts[name] = Count([*counts[name].places, *places], counts[name].total + total)

    for path in files:
        text = path.read_text(encoding="utf-8")
        tree, where = ast.parse(text), path.relative_to(ROOT).as_posix()
        for node, docstring, line in _docstrings(tree):
            shown = f"{where}:{line}"
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = docstring.split("\n", 1)[0]
                add("verbs", 1, *([] if _begins_with_verb(docstring) else [f"{shown} {first}"]))
            prose = _prose(docstring)
            add("semicolons", len(docstring.split()), *[f"{shown} {each}" for each in _sentences(prose) if ";" in each])
            for sentence in _sentences(prose):
                is_long = len(sentence.split()) > LONGEST_SENTENCE
                add("sentences", 1, *([f"{shown} {sentence}"] if is_long else []))
        for name, line in _bound_names(tree):
            add("names", 1, *([f"{where}:{line} {name}"] if EMPTY_NAMES.match(name) else []))
        if where.startswith(NUMERICAL) and len(tree.body) > 1:
            lines = sum(bool(line.strip()) for line in text.split("\n"))
            add("comments", lines, *[where] * _comments(text))
    stems = Counter(path.stem for path in files if path.stem != "__init__")
    add("modules", len(files), *[name for name, times in stems.items() if times > 1])
    return counts


# Name: how it is said, what is divided by the total, and the most (or, where negative, the least) that passes.
BARS = {
    "verbs": ("function docstrings that do not begin with a verb, per 100", 100, 5.0),
    "semicolons": ("sentences of docstrings joined by a semicolon, per 1000 words", 1000, 2.0),
    "sentences": (f"sentences of docstrings over {LONGEST_SENTENCE} words, per 100", 100, 5.0),
    "names": ("variables named by an empty word", 0, 20.0),
    "modules": ("module names that stand more than once", 0, 0.0),
    "comments": ("comments per 100 lines of numerical code", 100, -6.0),
}


def main() -> None:
    """Prints the figures that miss their bar (all, if places are listed), and ends with status 1 if one does."""
    arguments = [each for each in sys.argv[1:] if each != "--list"]
    every = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    files = [Path(argument).resolve() for argument in arguments] or every
    missed = False
    for name, (words, scale, bar) in BARS.items():
        places, total = measure(sorted(files))[name]
        figure = len(places) * (scale / total if scale and total else 1)
        is_missed = figure > bar if bar >= 0 else figure < -bar
        missed |= is_missed
        lists = bool(arguments) or "--list" in sys.argv
        if lists and bar >= 0:
            print("\n".join(f"{name}: {place}" for place in places))
        if is_missed or lists:
            print(f"{name}: {figure:.1f} {words}; wanted at {f'most {bar:g}' if bar >= 0 else f'least {-bar:g}'}")
    sys.exit(int(missed and not arguments))


if __name__ == "__main__":
    main()
