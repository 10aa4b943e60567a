"""Several caches in one order: shares exact, each part in its own epochs, any K."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.cache.manifest import read_manifest
from data.cache.selection import Selection
from data.stream.collate import Collate
from data.stream.mixing import PartSequence
from data.stream.order import LANES, Place
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


PART = st.tuples(st.floats(0.05, 20), st.floats(0.2, 1))


@given(st.lists(PART, min_size=1, max_size=5))
def test_shares_are_exact_to_a_row_at_any_place(parts: list[tuple[float, float]]) -> None:
    costs = [scored / weight for weight, scored in parts]
    sequence = PartSequence(costs)
    wanted = [weight / scored / sum(w / s for w, s in parts) for weight, scored in parts]
    taken = [0] * len(parts)
    for place in range(400):
        assert sequence.taken(place) == taken
        assert all(abs(taken[i] - wanted[i] * place) <= len(parts) for i in range(len(parts)))
        taken[sequence.part(taken)] += 1


def test_a_place_far_behind_is_found_without_walking_there() -> None:
    sequence = PartSequence([0.3, 0.7, 11.0])
    taken, place = sequence.taken(10_000_000), 10_000_000
    assert sum(taken) == place
    for _ in range(100):
        taken[sequence.part(taken)] += 1
        place += 1
        assert sequence.taken(place) == taken


def _mixture(tiny: Tiny, narrow: Path) -> Mixture:
    return Mixture(
        {"wide": Shards(str(tiny.train)), "narrow": Shards(str(narrow), top_k=2)},
        {"wide": 3, "narrow": 1},
    )


def _places(source: Mixture, count: int) -> list[Place]:
    order = source.order(ROW_LENGTH, 5)
    return [order.place(i) for i in range(count)]


def test_each_part_goes_through_its_own_epochs(tiny: Tiny, narrow: Path) -> None:
    """Its rows come in its own order, but for those of about two turns through the lanes."""
    mixture = _mixture(tiny, narrow)
    order = mixture.order(ROW_LENGTH, 5)
    places = _places(mixture, 12 * max(cache.rows for cache in order.orders))
    positions = Counter[int]()
    for part, cache in enumerate(order.orders):
        numbers = {cache.place(i)._replace(part=part): i for i in range(len(places))}
        own = [numbers[place] for place in places if place.part == part]
        assert len(set(own)) == len(own)
        assert all(abs(number - turn) <= 2 * LANES for turn, number in enumerate(own))
        assert set(range(len(own) - 2 * LANES)) <= set(own)
        positions[part] = sum(order.row(place).positions for place in places if place.part == part)
    assert positions[1] / positions.total() == pytest.approx(0.75, abs=4 * ROW_LENGTH / positions.total())


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
    assert _places(one, 50) == _places(other, 50)


def test_a_part_in_which_nothing_is_scored_is_refused(tiny: Tiny) -> None:
    shards = Shards(str(tiny.train))
    manifest = read_manifest(tiny.train)
    vars(shards)["manifest"] = replace(manifest, statistics={**manifest.statistics, "scored": 0.0})
    with pytest.raises(UsageError, match="no position of the cache is scored"):
        Mixture({"only": shards}, {"only": 1}).order(ROW_LENGTH, 0)
