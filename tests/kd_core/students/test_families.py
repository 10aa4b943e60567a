"""Every family against transformers on random weights. The figures are a table in docs/students.md."""

from pathlib import Path

import pytest

from tests.kd_core.students.family_checks import CHECKS, Comparison
from tests.kd_core.students.models import FAMILIES

TOLERANCE = 1e-4
PAGE = Path(__file__).parents[3] / "docs" / "students.md"
# Errors by family of the registry and check, the largest of all models of that family.
MEASURED: dict[str, dict[str, float]] = {}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by an older name
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    compared = Comparison(name, tmp_path)
    errors = {check: measure(compared) for check, measure in CHECKS.items()}
    row = MEASURED.setdefault(compared.ours.arch.family, {})
    for check, error in errors.items():
        row[check] = max(error, row.get(check, 0.0))
    assert {check: error for check, error in errors.items() if not error < TOLERANCE} == {}
