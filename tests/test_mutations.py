"""`make mutations` takes ten minutes. That its replacements still find their place is checked here."""

import pytest

from tests.mutations import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_finds_its_place(mutant: Mutant) -> None:
    text = (ROOT / "kd_core" / "losses" / f"{mutant.file}.py").read_text()
    assert mutant.old in text
