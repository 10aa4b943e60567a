"""A seeded sample of the faults of benchmarks/faults.py: none unseen, none that does harm."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.fault_kinds import ACCIDENTS, ATTACKS
from benchmarks.faults import make_caches, run_all
from tests.patience import patience

MUTATIONS = 500


def test_no_fault_passes_unseen_and_no_attack_does_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "SECONDS", patience(faults.SECONDS))
    harness = run_all(make_caches(tmp_path), MUTATIONS, seed=1)
    assert harness.failed == []
    total = sum(harness.counts.values(), Counter())
    assert total["tried"] == MUTATIONS
    accidents = sum((harness.counts[kind] for kind in ACCIDENTS), Counter())
    assert accidents["by verify"] == accidents["tried"], "verify alone finds every accident"
    assert all(harness.counts[kind]["tried"] > 2 for kind in (*ACCIDENTS, *ATTACKS))
