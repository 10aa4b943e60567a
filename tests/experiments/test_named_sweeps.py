"""Every sweep of experiments/: each of its points builds, and none is there twice."""

import pytest

from experiments.config import catalog
from experiments.config.catalog import Entry
from experiments.config.sweep_points import resolve_points

SWEEPS = [entry for entry in catalog.entries() if entry.kind == catalog.SWEEP]


@pytest.mark.parametrize("entry", SWEEPS, ids=lambda entry: entry.name)
def test_every_point_builds(entry: Entry) -> None:
    points = resolve_points(entry.load()(), [], entry.name)
    assert len({point.id for point in points}) == len(points) > 1
    for point in points:
        assert point.build().steps == point.steps


@pytest.mark.parametrize("entry", SWEEPS, ids=lambda entry: entry.name)
def test_it_opens_with_its_question_and_what_is_expected(entry: Entry) -> None:
    assert entry.summary
    text = entry.load().__doc__ or ""
    assert "Expected:" in text
    assert "Seen:" in text
