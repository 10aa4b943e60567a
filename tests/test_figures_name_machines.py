"""Times and sizes in the README and its pages name the machine they were seen on, there or in the paragraph before."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBER_WORDS = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty"
UNIT = r"(?:s|seconds|min|minutes|hours|MB|GB|MiB|GiB|tok/s|tokens/s)\b"
FIGURE = re.compile(rf"(?:\b\d[\d.,]*\s?|\b(?:{NUMBER_WORDS})\s){UNIT}", re.IGNORECASE)
# Sizes and times in the other pages of docs/ are limits and settings, not measurements.
PAGES = (
    "README.md", "WORKSPACE.md", "docs/caches.md", "docs/coming_from_nemo_aligner.md", "docs/decisions.md",
    "docs/experiments.md", "docs/one_batch.md", "docs/operations.md", "docs/own_data.md", "docs/students.md",
    "docs/studies.md", "docs/training.md",
)  # fmt: skip
MACHINE = re.compile(r"AVX2|AVX-512|\bARM\b|Apple M\d|\b[AHB]\d00\b")


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs, tables and whole code blocks."""
    lines: list[str] = []
    fenced = False
    for line in [*text.splitlines(), ""]:
        fenced ^= line.startswith("```")
        if line.strip() or fenced:
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def nameless(text: str) -> list[str]:
    """Returns the blocks with a time or a size whose machine is named neither there nor in the block before."""
    pairs = itertools.pairwise(["", *_blocks(text)])
    return [block for before, block in pairs if FIGURE.search(block) and not MACHINE.search(f"{before}\n{block}")]


@pytest.mark.parametrize("page", PAGES)
def test_figures_name_the_kind_of_machine(page: str) -> None:
    assert nameless((ROOT / page).read_text()) == []


@pytest.mark.parametrize(
    "figure",
    ["It takes 12 minutes.", "It takes six minutes.", "A run of 3.1 GB.", "```\nstep 5: 736 tok/s\n\nmore\n```"],
)
def test_a_figure_without_a_machine_is_found(figure: str) -> None:
    assert nameless(f"# A page\n\nText.\n\n{figure}\n") == [figure]
    assert nameless(f"# A page\n\nOn two cores with AVX2:\n\n{figure}\n") == []
    assert nameless("Some 12 tokens, step 60 of 60, in version 2.13 of 2026.") == []
