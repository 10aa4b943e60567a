"""Rates and decay by name pattern, against AdamW written out in float64, and what is refused of them."""

from typing import Any

import fiddle as fdl
import pytest
import torch
from torch import Tensor, nn

from experiments.config.config_items import freeze, record_json
from experiments.config.paths import set_path, set_value
from experiments.half_depth import quickstart
from kd_core.errors import UsageError
from kd_core.training.optimizer import AdamW, TorchOptimizer, peak_rates, set_rates
from kd_core.training.parameter_groups import Group

GROUPS = {"embed*": Group(lr_scale=0.1, weight_decay=0.0), "block.*": Group(lr_scale=3.0, weight_decay=0.2)}


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "block": nn.Linear(4, 3), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 5)}
    )
    model["norm"].requires_grad_(False)
    return model


def _gradient(name: str, step: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(step * 100 + len(name)))


def _adamw(name: str, first: Tensor, lr: float, decay: float, factors: list[float]) -> Tensor:
    """arXiv 1711.05101, algorithm 2: m̂ / (√v̂ + ε), and decay apart from it."""
    p, m, v, (b1, b2) = first.double(), 0.0, 0.0, (0.9, 0.95)
    for t, factor in enumerate(factors, 1):
        g = _gradient(name, t, first).double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - factor * lr * (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8) + decay * p)
    return p


def _moved(settings: AdamW | TorchOptimizer, factors: list[float]) -> dict[str, Tensor]:
    model = _model()
    optimizer, named = settings.build(model), dict(model.named_parameters())
    for t, factor in enumerate(factors, 1):
        set_rates(optimizer, factor)
        for name, parameter in named.items():
            parameter.grad = _gradient(name, t, parameter) if parameter.requires_grad else None
        optimizer.step()
    return named


BETAS = {"betas": (0.9, 0.95)}


@pytest.mark.parametrize(
    "settings",
    [AdamW(lr=1e-2, weight_decay=0.5, groups=GROUPS), TorchOptimizer("AdamW", 1e-2, BETAS, 0.5, groups=GROUPS),
     TorchOptimizer("AdamW", 3e-2, BETAS, 0.2, only=("block.*",),
                    others=AdamW(lr=1e-2, weight_decay=0.5, groups={"embed*": GROUPS["embed*"]}))],
)  # fmt: skip
def test_each_parameter_moves_at_its_own_rate(settings: AdamW | TorchOptimizer) -> None:
    wanted = {"embed.weight": (1e-3, 0.0), "block.weight": (3e-2, 0.2), "block.bias": (3e-2, 0.0),
              "head.weight": (1e-2, 0.5), "head.bias": (1e-2, 0.0)}  # fmt: skip
    first, moved = dict(_model().named_parameters()), _moved(settings, [1.0, 0.5, 0.25])
    for name, (lr, decay) in wanted.items():
        expected = _adamw(name, first[name].detach(), lr, decay, [1.0, 0.5, 0.25])
        assert (moved[name].detach() - expected).abs().max() < 1e-6, name
        assert (moved[name] - first[name]).abs().max() > 1e-4
    assert torch.equal(moved["norm.weight"], first["norm.weight"])


def test_rates_are_logged_where_they_differ() -> None:
    assert peak_rates(AdamW(lr=1e-2)) == {"lr": 1e-2}
    assert peak_rates(AdamW(lr=1e-2, groups={"a": Group(weight_decay=0.1)})) == {"lr": 1e-2}
    others = AdamW(lr=1e-3, groups={"norm*": Group(2.0)})
    settings = TorchOptimizer("Muon", 1e-2, only=("b*",), others=others, groups={"b*": Group(0.5)})
    assert peak_rates(settings) == {"lr": 1e-2, "lr/b*": 5e-3, "lr/others": 1e-3, "lr/others/norm*": 2e-3}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"embd*": Group(0.1)}, r"optimizer.groups: 'embd\*' matches nothing. Near it: embed"),
        ({"norm.*": Group(0.1)}, r"optimizer.groups: 'norm.\*' matches nothing"),  # it is not trained
        (
            {"block.*": Group(0.1), "*.weight": Group(2.0)},
            r"block.weight matches 'block.\*' and '\*.weight'; wanted one",
        ),
        ({"*.bias": Group(weight_decay=0.1)}, r"optimizer.groups.\*.bias.weight_decay: got 0.1; it matches no matrix"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(groups: dict[str, Group], message: str) -> None:
    for settings in (AdamW(groups=groups), TorchOptimizer("SGD", 0.1, groups=groups)):
        for check in (settings.build, settings.check_names):
            with pytest.raises(UsageError, match=message):
                check(_model())
    both = TorchOptimizer("SGD", 0.1, only=("head.*",), others=AdamW(groups=groups))
    with pytest.raises(UsageError, match=r"optimizer\.others\.groups"):
        both.check_names(_model())


def test_a_decay_that_the_optimiser_has_not_is_refused() -> None:
    with pytest.raises(UsageError, match="Rprop has none"):
        TorchOptimizer("Rprop", 0.1, groups={"embed*": Group(weight_decay=0.1)})


FLAG = 'optimizer.groups={"embed_tokens.*": {"lr_scale": 0.1, "weight_decay": 0}, "layers.[0-3].*": {"lr_scale": 2}}'


def test_flags_sweeps_and_records_hold_groups() -> None:
    wanted = {"embed_tokens.*": Group(0.1, 0.0), "layers.[0-3].*": Group(2.0)}
    by_flag, swept = quickstart(), quickstart()
    set_path(by_flag, FLAG)
    set_value(swept, "optimizer.groups", {"embed_tokens.*": fdl.Config(Group, lr_scale=0.1, weight_decay=0.0),
                                          "layers.[0-3].*": {"lr_scale": 2}}, "grid")  # fmt: skip
    assert fdl.build(by_flag).optimizer.groups == fdl.build(swept).optimizer.groups == wanted
    assert record_json(freeze(by_flag)) == record_json(freeze(swept))
    set_path(by_flag, "optimizer.groups.layers.[0-3].*.lr_scale=3")
    assert fdl.build(by_flag).optimizer.groups["layers.[0-3].*"] == Group(3.0)
    set_path(by_flag, "optimizer.groups={}")
    assert fdl.build(by_flag).optimizer == fdl.build(quickstart()).optimizer
    # A default that a class makes anew is recorded as a value.
    plain = fdl.Config(TorchOptimizer, cls="SGD", lr=0.1)
    assert fdl.build(freeze(plain)) == fdl.build(plain)
    assert '"<factory>"' not in record_json(freeze(plain))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"e": {"lr_scal": 0.1}}', "optimizer.groups.e has no 'lr_scal'. Did you mean 'lr_scale'?"),
        ('{"e": {"lr_scale": "much"}}', "got 'much', wanted float"),
        ('{"e": 3}', r"wanted Mapping\[str, Group\] as {NAME: {…}}"),
        ("{3: {}}", r"wanted Mapping\[str, Group\] as {NAME: {…}}"),
        ("3", r"got '3', wanted Mapping\[str, Group\]"),
    ],
)
def test_flags_of_another_shape_are_refused(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        set_path(quickstart(), f"optimizer.groups={value}")
