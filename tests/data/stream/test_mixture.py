"""Several caches in one order: shares exact, each part in its own epochs, any K."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.cache.manifest import read_manifest
from data.cache.selection import Selection
from data.stream.collate import Collate
from data.stream.mixing import interleave
from data.stream.order import Row
from data.stream.source import Mixture, Shards
from data.stream.stream import training_steps
from kd_core.errors import UsageError
from tests.tiny import ROW_LENGTH, Tiny, write_caches


@pytest.fixture(scope="module")
def narrow(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus again, with 3 entries a position."""
    folder = tmp_path_factory.mktemp("narrow")
    write_caches(tiny.export(selection=Selection(top_k=3)), folder)
    return folder / "train"


def _row(positions: int) -> Row:
    return Row((), positions, frozenset())


def _endless(lengths: list[int]) -> Iterator[Row]:
    while True:
        yield from map(_row, lengths)


PART = st.tuples(st.lists(st.integers(1, 32), min_size=1, max_size=5), st.floats(0.05, 20), st.floats(0.2, 1))


@given(st.lists(PART, min_size=1, max_size=5))
def test_shares_are_exact_to_a_row_at_any_time(parts: list[tuple[list[int], float, float]]) -> None:
    weights = [weight / sum(w for _, w, _ in parts) for _, weight, _ in parts]
    scored = [share for _, _, share in parts]
    mixed = interleave([_endless(rows) for rows, _, _ in parts], [s / w for s, w in zip(scored, weights, strict=True)])
    taken = [0.0] * len(parts)
    for row in islice(mixed, 400):
        taken[row.part] += row.positions * scored[row.part]
        for part, weight in enumerate(weights):
            assert abs(taken[part] - weight * sum(taken)) <= 32 * len(parts)


def _mixture(tiny: Tiny, narrow: Path) -> Mixture:
    return Mixture(
        {"wide": Shards(str(tiny.train)), "narrow": Shards(str(narrow), top_k=2)},
        {"wide": 3, "narrow": 1},
    )


def test_each_part_goes_through_its_own_epochs(tiny: Tiny, narrow: Path) -> None:
    mixture = _mixture(tiny, narrow)
    epochs = [len(list(part.rows(ROW_LENGTH, 5, 0))) for part in mixture.parts]
    rows = list(islice(mixture.order(ROW_LENGTH, 5), 8 * max(epochs)))
    positions = Counter[int]()
    for part, shards in enumerate(mixture.parts):
        own = [replace(row, part=0) for row in rows if row.part == part]
        assert own == list(islice(shards.order(ROW_LENGTH, 5), len(own)))
        assert own[: epochs[part]] == list(shards.rows(ROW_LENGTH, 5, 0))
        positions[part] = sum(row.positions for row in own)
    assert positions[1] / positions.total() == pytest.approx(0.75, abs=ROW_LENGTH / positions.total())


def test_rows_of_another_width_are_widened_with_unused_entries(tiny: Tiny, narrow: Path) -> None:
    steps = training_steps(
        _mixture(tiny, narrow),
        Collate(ROW_LENGTH),
        seed=0,
        start_row=0,
        rows_per_step=8,
        micro_batch=8,
        rank=0,
        ranks=1,
    )
    (batch,) = next(steps)
    steps.close()
    used = (batch.topk_log_probs > -torch.inf).sum(-1)[batch.document_ids >= 0]
    assert sorted(set(used.tolist())) == [2, 8]
    assert {name.rpartition(":")[0] for name in batch.record_names} == {str(tiny.train), str(narrow)}
    total = batch.topk_log_probs.exp().sum(-1) + batch.tail_log_prob.exp()
    assert torch.allclose(total[batch.document_ids >= 0], torch.tensor(1.0), atol=1e-4)


@pytest.mark.parametrize(
    "weights", [{}, {"a": 1}, {"a": 1, "c": 1}, *({"a": 1, "b": b} for b in (0, -1, "inf", "nan"))]
)
def test_weights_are_one_a_cache_and_above_0(weights: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="shards"):
        Mixture({"a": Shards("a"), "b": Shards("b")}, {name: float(weight) for name, weight in weights.items()})


def test_the_order_in_which_caches_are_named_means_nothing(tiny: Tiny, narrow: Path) -> None:
    one = _mixture(tiny, narrow)
    other = Mixture(dict(reversed(one.caches.items())), one.weights)
    assert list(islice(one.order(ROW_LENGTH, 0), 50)) == list(islice(other.order(ROW_LENGTH, 0), 50))


def test_a_part_in_which_nothing_is_scored_is_refused(tiny: Tiny) -> None:
    shards = Shards(str(tiny.train))
    manifest = read_manifest(tiny.train)
    vars(shards)["manifest"] = replace(manifest, statistics={**manifest.statistics, "scored": 0.0})
    with pytest.raises(UsageError, match="no position of the cache is scored"):
        Mixture({"only": shards}, {"only": 1}).order(ROW_LENGTH, 0)
