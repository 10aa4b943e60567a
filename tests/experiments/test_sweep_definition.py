"""The algebra of sweeps: which points there are, in which order, and what is refused."""

import functools
import itertools
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.base.distill import distill
from experiments.base.sweep_definition import (
    Axis,
    Sweep,
    choice,
    fiddled,
    grid,
    log_uniform,
    random,
    seeds,
    tied,
    together,
    uniform,
    where,
    zipped,
)
from experiments.half_depth import quickstart
from experiments.sampled import sampled
from kd_core.errors import UsageError


def _values(sweep: Sweep) -> list[dict[str, Any]]:
    return [draft.values for draft in sweep]


def test_a_product_varies_its_last_axis_first() -> None:
    found = _values(Sweep(quickstart) * grid("a", [1, 2]) * seeds(2))
    assert found == [{"a": 1, "seed": 0}, {"a": 1, "seed": 1}, {"a": 2, "seed": 0}, {"a": 2, "seed": 1}]


def test_several_experiments_cross_every_axis_and_sums_keep_their_own() -> None:
    both = Sweep(quickstart, sampled) * grid("a", [1, 2]) + Sweep(quickstart) * grid("b", [3])
    assert [(draft.experiment, draft.values) for draft in both] == [
        ("quickstart", {"a": 1}),
        ("quickstart", {"a": 2}),
        ("sampled", {"a": 1}),
        ("sampled", {"a": 2}),
        ("quickstart", {"b": 3}),
    ]


def test_zipped_and_tied_values_change_together() -> None:
    assert _values(Sweep(quickstart) * zipped({"a": [1, 2], "b": [3, 4]})) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert _values(Sweep(quickstart) * tied(("a", "b"), [1, 2])) == [{"a": 1, "b": 1}, {"a": 2, "b": 2}]


def test_filters_see_values_and_the_experiments_name() -> None:
    sweep = Sweep(quickstart, sampled) * grid("a", [1, 2])
    kept = sweep * where(lambda v: v["experiment"] == "sampled" or v["a"] == 2)
    assert [(draft.experiment, draft.values["a"]) for draft in kept] == [
        ("quickstart", 2),
        ("sampled", 1),
        ("sampled", 2),
    ]


paths = st.sampled_from(["a", "b", "c.d", "c.e"])
lists = st.lists(st.integers(), min_size=1, max_size=4)


@given(st.dictionaries(paths, lists, max_size=4), st.lists(st.sampled_from([quickstart, sampled]), max_size=2))
def test_a_product_has_each_combination_once(axes: dict[str, list[int]], bases: list[Any]) -> None:
    sweep = Sweep(*bases)
    for path, values in axes.items():
        sweep = sweep * grid(path, values)
    wanted = [(base, dict(zip(axes, row, strict=True))) for base in bases for row in itertools.product(*axes.values())]
    assert [(draft.base, draft.values) for draft in sweep] == wanted
    assert len(sweep) == len(wanted)


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(), st.sampled_from([log_uniform(1e-5, 1e-1), uniform(-1, 2)])
)
def test_more_draws_begin_with_the_same_ones(few: int, more: int, seed: int, sampler: Any) -> None:
    short, long = (random("lr", sampler, n, seed).choices for n in sorted((few, more)))
    assert long[: len(short)] == short


def test_draws_differ_by_path_and_by_seed_and_stay_within_their_bounds() -> None:
    draws = {
        (path, seed): [c[path] for c in random(path, log_uniform(1e-4, 1e-2), 200, seed).choices]
        for path in ("a", "b")
        for seed in (0, 1)
    }
    assert len({tuple(each) for each in draws.values()}) == 4
    for each in draws.values():
        assert all(1e-4 <= value <= 1e-2 for value in each)
        assert 60 < sum(value < 1e-3 for value in each) < 140  # half of a log scale lies below its middle
    assert {c["t"] for c in random("t", choice("x", "y"), 50).choices} == {"x", "y"}


def test_draws_do_not_repeat_where_there_are_others() -> None:
    three = Sweep(quickstart) * random("lr", choice(1e-4, 2e-4, 3e-4), 3)
    assert sorted(draft.values["lr"] for draft in three) == [1e-4, 2e-4, 3e-4]
    few = [draft.values["lr"] for draft in Sweep(quickstart) * random("lr", choice(1e-4, 2e-4, 3e-4), 2)]
    assert few == [draft.values["lr"] for draft in three][:2]
    hundred = Sweep(quickstart) * random("lr", uniform(0.1, 0.2), 101)  # all that have three digits
    assert sorted(draft.values["lr"] for draft in hundred) == pytest.approx([0.1 + i / 1000 for i in range(101)])


def test_draws_side_by_side_repeat_each_value_but_no_pair() -> None:
    drawn = together(random("tail", choice("a", "b"), 6), random("k", choice(1, 2, 4), 6))
    pairs = [(draft.values["tail"], draft.values["k"]) for draft in Sweep(quickstart) * drawn]
    assert sorted(pairs) == sorted(itertools.product("ab", (1, 2, 4)))
    numbered = Sweep(quickstart) * together(random("tail", choice("a", "b"), 6), seeds(6))
    assert len({draft.values["tail"] for draft in numbered}) == 2


def test_numbers_of_numpy_are_pythons_own() -> None:
    axes = [
        grid("steps", np.arange(2, 4)),
        grid("lr", np.linspace(0, 1, 3, dtype=np.float32)),
        grid("on", np.array([True, False])),
        grid("betas", np.array([[0.5, 0.9]])),
        grid("name", np.array(["a"])),
        grid("pair", [(np.int64(1), np.float64(2))]),
        tied(["a", "b"], np.arange(1)),
        seeds(cast(Any, np.int64(2))),
        random("c", lambda source: np.int64(source.randrange(9)), 2),
    ]
    kinds = [{type(value) for choice_ in axis.choices for value in choice_.values()} for axis in axes]
    assert kinds == [{int}, {float}, {bool}, {list}, {str}, {tuple}, {int}, {int}, {int}]
    assert [type(value) for value in axes[5].choices[0]["pair"]] == [int, float]


def test_axes_side_by_side() -> None:
    joined = together(grid("a", [1, 2]), random("b", uniform(0, 1), 2))
    assert isinstance(joined, Axis)
    assert [set(each) for each in joined.choices] == [{"a", "b"}, {"a", "b"}]


def test_arguments_given_in_advance_tell_experiments_apart() -> None:
    sweep = Sweep(functools.partial(distill, "a"), functools.partial(distill, "b", cache="c"))
    assert [draft.experiment for draft in sweep] == ["distill('a')", "distill('b', cache='c')"]


def test_functions_are_an_axis() -> None:
    def shorter(config: Any) -> None:
        config.steps = 3

    assert [each.values["fiddler:length"] for each in Sweep(quickstart) * fiddled(None, shorter, name="length")] == [
        None,
        shorter,
    ]


MISTAKES: list[tuple[Any, str]] = [
    (lambda: Sweep(quickstart) * grid("a", [1]) * grid("a", [2]), "a would hide the swept a"),
    (lambda: Sweep(quickstart) * grid("a.b", [1]) * grid("a", [2]), "a would hide the swept a.b"),
    (lambda: Sweep(quickstart) * seeds(2) * tied(("x", "seed"), [1]), "seed would hide the swept seed"),
    (lambda: grid("a", []), "at least one value"),
    (lambda: grid("a", "renormalized"), "got 'renormalized'; wanted a list"),
    (lambda: grid("a", cast(Any, 1e-3)), "got 0.001; wanted a list"),
    (lambda: seeds(0), "at least one value"),
    (lambda: seeds(cast(Any, [1, 2])), r"seeds: got \[1, 2\]; wanted how many"),
    (lambda: Sweep(cast(Any, quickstart())), r"Sweep: got a Config; wanted experiments' functions, not called"),
    (lambda: Sweep(cast(Any, "quickstart")), r"Sweep: got a str; wanted"),
    (lambda: Sweep(quickstart) * cast(Any, 3), r"Sweep \* 3: wanted an axis"),
    (lambda: Sweep(quickstart) + cast(Any, seeds(2)), r"Sweep \+ Axis: wanted another Sweep"),
    (lambda: fiddled(cast(Any, 3)), "fiddled: got 3; wanted functions"),
    (lambda: zipped({"a": [1, 2], "b": [1]}), r"got \[2, 1\] values; wanted equally many"),
    (lambda: together(grid("a", [1]), grid("a", [2])), "more than once"),
    (lambda: random("a", uniform(0, 1), 0), "at least 1"),
    (
        lambda: Sweep(quickstart) * random("lr", choice(1, 2, 2.0), 4),
        r"random\('lr'\): got 4 draws, of which only 2 differ, and equal ones would be one point. Draw 2, or from more",
    ),
    (lambda: log_uniform(0, 1), "0 < low < high"),
    (lambda: Sweep(quickstart) * where(lambda v: v["top_k"] == 1), "no value 'top_k'; it has 'experiment'"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_told_where_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
