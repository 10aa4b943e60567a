"""Every number of every part is tried out of its range: the graph is not built, and the message has its path."""

import typing
from collections.abc import Iterator
from math import inf, nan
from typing import Any

import fiddle as fdl
import pytest

from data.cache.selection import Selection
from experiments.chat import chat_export
from experiments.config.paths import Place, find_place, walk
from experiments.half_depth import quickstart
from experiments.low_rank import lora
from experiments.mixtures import cache_mix
from experiments.pretraining import pretraining
from experiments.sampled import sampled_export
from kd_core.errors import UsageError
from kd_core.losses.objective import CrossEntropy, Distillation
from kd_core.losses.term_weights import Constant, Cosine, Linear, WarmupStableDecay
from kd_core.losses.token_selection import KeepUncertain
from kd_core.training import lr_schedule
from kd_core.training.optimizer import AdamW, TorchOptimizer

# Where 0 makes sense, by the ends of paths. Everywhere else it is refused, and so is 1 where all must be below.
ZERO = (
    "seed", "weight", "value", "start", "end", "peak", "floor", "min_ratio", "warmup_steps", "decay_steps",
    "constant_steps", "betas", "weight_decay", "clip_norm", "max_skipped", "label_smoothing", "z_loss", "beta", "skew",
    "reverse_share", "head_mass", "head_weight", "tail_weight", "keep_best", "histograms_every", "min_prob", "prefetch",
    "max_damaged_blocks", "eod_id", "keep_layers", "layers", "dropout", "draws", "top_k", "overlap", "max_codec_kl",
    "max_spread", "momentum", "most_bad_rows",
)  # fmt: skip


def _with_schedules(kind: Any, **settings: float) -> fdl.Config[Any]:
    config = quickstart()
    config.loss.terms["kd"].weight = fdl.Config(kind, **settings)
    return config


def _with(**changes: Any) -> fdl.Config[Any]:
    config = quickstart()
    for path, value in changes.items():
        find_place(config, path.replace("__", "."), path).put(value)
    return config


def _entropic() -> fdl.Config[Any]:
    config = _with(loss__terms__kd__keep=fdl.Config(KeepUncertain, share=0.5))
    config.loss.terms["more"] = fdl.Config(Distillation, divergence="decoupled_kl")
    config.loss.terms["label"] = fdl.Config(CrossEntropy, label_smoothing=0.1, z_loss=1e-4)
    return config


GRAPHS = {
    "the quick start": quickstart(),
    "adapters": lora(),
    "a random student": pretraining(),
    "a mixture": cache_mix(),
    "an export": chat_export(),
    "an export of samples": sampled_export(),
    "entropies and labels": _entropic(),
    "constant": _with_schedules(Constant, value=0.5),
    "linear": _with_schedules(Linear, start=1.0, end=0.5),
    "cosine": _with_schedules(Cosine, start=1.0, end=0.5),
    "stable": _with_schedules(WarmupStableDecay, peak=1.0, warmup_steps=2, decay_steps=2, floor=0.5),
    "rates, linear": _with(schedule=fdl.Config(lr_schedule.WarmupLinear)),
    "rates, stable": _with(schedule=fdl.Config(lr_schedule.WarmupStableDecay, decay_steps=5)),
    "rates, constant": _with(schedule=fdl.Config(lr_schedule.WarmupConstant)),
    "Muon": _with(
        optimizer=fdl.Config(
            TorchOptimizer, cls="Muon", lr=0.02, settings={"momentum": 0.9}, only=("layers.*",),
            others=fdl.Config(AdamW),
        )
    ),
}  # fmt: skip


def _numbers(wanted: Any) -> set[type]:
    """Of an annotation: which numbers it takes; of a tuple those in it."""
    found = {kind for kind in (int, float) if wanted is kind}
    for inner in typing.get_args(wanted):
        found |= _numbers(inner)
    return found


def _bad(place: Place) -> Iterator[Any]:
    kinds = set[type]() if place.is_part else _numbers(place.annotation)
    wrong: list[Any] = [-1] if kinds else []
    wrong += [nan, inf, -inf] if float in kinds else []
    wrong += [] if place.name in ZERO else [0] if kinds else []
    for number in map(float, wrong) if float in kinds else wrong:
        yield (number,) * 2 if isinstance(place.value, tuple) or "tuple" in str(place.annotation) else number


PLACES = [(name, place.path) for name, config in GRAPHS.items() for place in walk(config) if any(_bad(place))]


def test_the_graphs_are_right_and_have_all_numbers() -> None:
    for name, config in GRAPHS.items():
        try:
            fdl.build(config)
        except UsageError as error:
            raise AssertionError(name) from error
    assert len(PLACES) > 300


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_number_out_of_its_range_is_refused_by_path(graph: str) -> None:
    missed: list[str] = []
    for path in [path for name, path in PLACES if name == graph]:
        config = GRAPHS[graph].__deepcopy__({})
        place = find_place(config, path, path)
        before = place.value
        for value in _bad(place):
            place.put(value)
            try:
                fdl.build(config)
            except UsageError as error:
                if place.name not in str(error).split("\n\nFiddle")[0]:
                    missed.append(f"{path}={value}: {error}")
            except Exception as error:
                missed.append(f"{path}={value}: {error!r}")
            else:
                missed.append(f"{path}={value}: built")
        place.put(before)
    assert not missed, "\n".join(missed)


def test_a_range_of_temperatures_that_would_draw_one_token_alone_is_refused() -> None:
    config = sampled_export()
    for value in (1e-3, 0.2, 5.0):
        config.selection.proposal_temperature = value
        with pytest.raises(UsageError, match="selection.proposal_temperature: got .*; wanted 0.25 to 4"):
            fdl.build(config)
    assert Selection(draws=3, proposal_temperature=0.2).draws == 3  # of a cache that was written before
