"""Documents name files, modules and headings that exist, and the two that everybody reads first are short."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Files of a fresh checkout. A folder such as runs/ or .venv/ may hold documents of others.
FOLDERS = ("kd_core", "data", "experiments", "launchers", "tests", "benchmarks", "docs", "examples")
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))]
)
# Words, and where there is a limit, lines.
LIMITS = {"README.md": (1300, 150), "WORKSPACE.md": (1800, None)}
# Files that a user may have, one of NeMo-Aligner, and a metric.
NO_PATHS = {"data.py", "helpers.py", "compute_topk_logits.py", "data/damaged_blocks"}
TARGET = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*/?")
MODULE = re.compile(r"python3? -m ((?:kd_core|data|experiments|launchers|tests|benchmarks)(?:\.\w+)*)")


def _text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def is_path(code: str) -> bool:
    """Accepts a path below a folder of the repository, and the name of a Python file."""
    folder, slash, _ = code.partition("/")
    is_named_so = code.endswith(".py") or (slash and folder in FOLDERS)
    return bool(is_named_so and PATH.fullmatch(code)) and code not in NO_PATHS


def missing_paths(document: str, text: str) -> Iterator[str]:
    """Yields each path in backticks that does not exist.

    A path is looked for at the root and beside the document. A bare name may also be beside the path before it on
    its line: `kd_core/training/step.py`, `loop.py`.
    """
    for line in _without_blocks(text).splitlines():
        beside = (ROOT / document).parent
        for code in filter(is_path, CODE.findall(line)):
            places = [folder / code for folder in (ROOT, (ROOT / document).parent, beside)]
            exists = next((path for path in places if path.exists()), None)
            if exists is None:
                yield code
            elif "/" in code.rstrip("/"):
                beside = exists if exists.is_dir() else exists.parent


def slug(heading: str) -> str:
    """Returns the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def missing_targets(document: str, text: str) -> Iterator[str]:
    """Yields each link into the repository whose file or heading does not exist."""
    for target in TARGET.findall(_without_blocks(text)):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if anchor and path.is_file() else []
        if not path.exists() or (anchor and anchor not in map(slug, headings)):
            yield target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_links_exist(document: str) -> None:
    text = _text(document)
    assert [*missing_paths(document, text), *missing_targets(document, text)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_that_are_named_exist(document: str) -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = [code for code in CODE.findall(_without_blocks(_text(document))) if re.fullmatch(r"test_\w+", code)]
    assert [name for name in names if f"def {name}(" not in sources] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_of_commands_exist(document: str) -> None:
    places = [ROOT / name.replace(".", "/") for name in MODULE.findall(_text(document))]
    assert [path for path in places if not path.with_suffix(".py").exists() and not path.is_dir()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_imports_of_examples_exist(document: str) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", _text(document), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FOLDERS:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("document", LIMITS)
def test_a_first_document_is_short(document: str) -> None:
    text, (words, lines) = _text(document), LIMITS[document]
    assert len(text.split()) <= words
    assert lines is None or len(text.splitlines()) <= lines


def test_what_is_missing_is_found() -> None:
    text = "`kd_core/types.py`, `errors.py`, `gone.py`, `docs/`, `data/gone/` [a](docs/gone.md) [b](README.md#gone)"
    assert list(missing_paths("README.md", text)) == ["gone.py", "data/gone/"]
    assert list(missing_targets("README.md", text)) == ["docs/gone.md", "README.md#gone"]
