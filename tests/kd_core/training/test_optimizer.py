"""Optimisers of torch and of users: what they refuse, and that what is saved of them goes on bit for bit."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.training.checkpoints import checkpoint
from kd_core.training.checkpoints.checkpoint import CheckpointContent, Progress
from kd_core.training.checkpoints.checkpoint_state import check_resumable, read_group_settings, run_state
from kd_core.training.optimizer import AdamW, Optimizer, TorchOptimizer, set_rates
from kd_core.training.step import train_step
from tests.kd_core.parallel.test_layouts import OBJECTIVE, OF_TWO, PLAIN, batches, first_weights, put, tied, whole
from tests.ranks import run_ranks

HIDDEN = ("layers.*_proj.weight",)


class Heavy(torch.optim.Optimizer):
    """A user's: a running sum in float64, and one number a row."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, share: float = 0.5) -> None:
        super().__init__(groups, {"lr": lr, "share": share, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad.double()
                kept = self.state[parameter]
                kept["sum"] = group["share"] * kept.get("sum", 0 * gradient) + gradient
                if gradient.ndim > 1:
                    kept["rows"] = kept.get("rows", 0.0) + gradient.abs().sum(dim=1)
                parameter.sub_((group["lr"] * kept["sum"]).float())


def heavy(groups: Iterable[dict[str, Any]], lr: float, share: float = 0.5) -> torch.optim.Optimizer:
    """Make one as an experiment's function does."""
    return Heavy(groups, lr, share)


OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": AdamW(lr=1e-2, weight_decay=0.1),
    "SGD": TorchOptimizer("SGD", 0.1, {"momentum": 0.9, "nesterov": True}, weight_decay=0.01),
    "SGD without a state": TorchOptimizer("SGD", 0.1),
    "Adafactor": TorchOptimizer("Adafactor", 1e-2, {"d": 2.0}, weight_decay=0.01),
    "Adagrad": TorchOptimizer("Adagrad", 1e-2),
    "NAdam": TorchOptimizer("NAdam", 1e-2, {"betas": (0.9, 0.99)}),
    "Rprop": TorchOptimizer("Rprop", 1e-2),
    "Muon": TorchOptimizer("Muon", 1e-2, {"momentum": 0.9}, 0.1, HIDDEN, AdamW(lr=1e-3)),
    "a user's": TorchOptimizer(heavy, 1e-2, {"share": 0.9}),
}


def _student(settings: Optimizer, parallel: Parallel, world: World) -> tuple[Decoder, torch.optim.Optimizer, World]:
    world = world.with_layout(parallel.layout(world.size))
    model = parallelize(tied(), parallel, world)
    for name, parameter in model.named_parameters():
        put(parameter, first_weights(tied)[name])
    return model, settings.build(model), world


def _steps(model: Decoder, optimizer: torch.optim.Optimizer, parallel: Parallel, world: World, which: range) -> None:
    for step in which:
        set_rates(optimizer, 1 / (1 + step))
        found = batches(step, parallel, world)
        train_step(model, optimizer, found, objective=OBJECTIVE, clip_norm=1.0, parallel=parallel, world=world)


def _values(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in run_state(model, optimizer).items()}


def _resumed(world: World, root: Path, settings: Optimizer, parallel: Parallel) -> None:
    """Two steps, saved; two more, with what was loaded of them and without a stop: the same bits."""
    model, optimizer, world = _student(settings, parallel, world)
    as_built = read_group_settings(optimizer)
    _steps(model, optimizer, parallel, world, range(2))
    check_resumable(model, optimizer, as_built)
    content = CheckpointContent(run_state(model, optimizer), Progress(2, 8), {}, "")
    folder = checkpoint.write(root, content, world, None)
    world.barrier()
    other, fresh, _ = _student(settings, parallel, world)
    assert checkpoint.load(folder, other, fresh) == Progress(2, 8)
    wanted = _values(model, optimizer)
    assert all(torch.equal(wanted[name], tensor) for name, tensor in _values(other, fresh).items())
    for each, its in ((model, optimizer), (other, fresh)):
        _steps(each, its, parallel, world, range(2, 4))
    wanted, found = _values(model, optimizer), _values(other, fresh)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    _resumed(World(), tmp_path, OPTIMIZERS[name], PLAIN)


def _on_two(world: World, root: Path) -> None:
    """Resumed in each layout, where the parameters also are those of one process."""
    for name in ("SGD", "Muon", "a user's"):
        alone, its, _ = _student(OPTIMIZERS[name], PLAIN, World())
        _steps(alone, its, PLAIN, World(), range(2))
        wanted = _values(alone, its)
        for layout in ("dp 2", "tp 2"):
            parallel = OF_TWO[layout]
            _resumed(world, root / f"{name} {layout}", OPTIMIZERS[name], parallel)
            model, optimizer, laid_out = _student(OPTIMIZERS[name], parallel, world)
            _steps(model, optimizer, parallel, laid_out, range(2))
            for key, tensor in _values(model, optimizer).items():
                assert (tensor - wanted[key]).norm() <= 1e-3 * wanted[key].norm() + 1e-6, (name, layout, key)


def test_shared_by_two_ranks_it_is_that_of_one_process(tmp_path: Path) -> None:
    run_ranks(2, _on_two, tmp_path)


def _muon_on_two(world: World) -> None:
    """torch rounds Muon's products to bfloat16. In float32, a shard moves as its part of the whole matrix does."""
    torch.Tensor.bfloat16 = torch.Tensor.clone  # type: ignore[method-assign, assignment] (of this process alone)
    settings, first = OPTIMIZERS["Muon"], first_weights(tied)
    alone, its, _ = _student(settings, PLAIN, World())
    _steps(alone, its, PLAIN, World(), range(1))
    for layout in ("dp 2", "tp 2"):
        model, optimizer, laid_out = _student(settings, OF_TWO[layout], world)
        _steps(model, optimizer, OF_TWO[layout], laid_out, range(1))
        for name, parameter in alone.named_parameters():
            found = whole(dict(model.named_parameters())[name]).detach()
            move = (parameter.detach() - first[name]).norm()
            assert (found - parameter.detach()).norm() <= 1e-3 * move, (layout, name)


def test_muon_makes_whole_matrices_orthogonal_and_not_shards() -> None:
    run_ranks(2, _muon_on_two)


def test_each_takes_the_parameters_that_are_its_own() -> None:
    """Muon by hand: X ← aX + (bXXᵀ + c(XXᵀ)²)X, five times, of the gradient over its norm."""
    model, optimizer, _ = _student(OPTIMIZERS["Muon"], PLAIN, World())
    hidden, norm = model.layers[0].mlp.up_proj.weight, model.norm.weight
    before = hidden.detach().double().clone()
    _steps(model, optimizer, PLAIN, World(), range(1))
    assert optimizer.state[hidden].keys() == {"momentum_buffer"}
    assert optimizer.state[norm].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3, 1e-3]
    X = optimizer.state[hidden]["momentum_buffer"].double().T  # of one step: all of its gradients point this way
    X = X / X.norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    wanted = before * (1 - 1e-2 * 0.1) - 1e-2 * max(1, 24 / 16) ** 0.5 * X.T
    assert (hidden.detach() - wanted).norm() < 0.02 * (before - wanted).norm()  # torch multiplies in bfloat16


class _Counts(Heavy):
    """Keeps a counter where no checkpoint looks."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.param_groups[0]["share"] *= 0.9


class _Keeps(Heavy):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        for kept in self.state.values():
            kept.update(self.more)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"steps": 3}, r"_Keeps keeps 'steps' \(int\) of embed_tokens.weight"),
        ({"a.b": torch.zeros(())}, "keeps 'a.b'"),
        ({"codes": torch.zeros(4, dtype=torch.int16)}, r"keeps 'codes' \(torch.int16 \[4\]\)"),
        ({"square": torch.zeros(99, 99)}, r"keeps 'square' \(torch.float32 \[99, 99\]\)"),
        (None, "a step of _Counts changes share of its groups"),
    ],
)
def test_what_no_checkpoint_holds_is_refused_after_the_first_step(more: dict[str, object] | None, message: str) -> None:
    model, _, world = _student(AdamW(), PLAIN, World())
    optimizer = (_Counts if more is None else _Keeps)([{"params": list(model.parameters())}], 1e-3)
    optimizer.more = more  # type: ignore[union-attr]
    as_built = read_group_settings(optimizer)
    _steps(model, optimizer, PLAIN, world, range(1))
    with pytest.raises(UsageError, match=message):
        check_resumable(model, optimizer, as_built)


def nothing(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Forget to return it."""


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "decay among its settings": (
        {"cls": "SGD", "settings": {"weight_decay": 0.1}},
        r"optimizer.settings: weight_decay has a setting of its own. Set optimizer.weight_decay",
    ),
    "no such class": ({"cls": "AdamWW"}, "optimizer.cls: got 'AdamWW'; wanted one of ASGD, .*Adafactor"),
    "one that calls the model again": ({"cls": "LBFGS"}, "optimizer.cls: got 'LBFGS'"),
    "no such setting": ({"cls": "SGD", "settings": {"momentun": 0.9}}, "SGD with {'momentun': 0.9}: .*unexpected"),
    "a setting out of its range": ({"cls": "SGD", "settings": {"momentum": -1.0}}, "Invalid momentum value: -1.0"),
    "a setting without its partner": ({"cls": "SGD", "settings": {"nesterov": True}}, "Nesterov momentum requires"),
    "no decay": ({"cls": "Rprop", "weight_decay": 0.1}, "optimizer.weight_decay: got 0.1; Rprop has none"),
    "a rate of nothing": ({"cls": "SGD", "lr": 0.0}, "optimizer.lr: got 0.0; wanted more than 0"),
    "half of the parameters": ({"cls": "Muon", "only": HIDDEN}, "optimizer.only, .others: wanted both"),
    "another bound for the others": (
        {"cls": "Muon", "only": HIDDEN, "others": AdamW(clip_norm=0.5)},
        r"optimizer.others.clip_norm: got 0.5; .*by optimizer.clip_norm, which is 1.0. Set optimizer.clip_norm",
    ),
    "others that are skipped alone": (
        {"cls": "Muon", "only": HIDDEN, "others": AdamW(on_non_finite="skip")},
        "optimizer.others.on_non_finite: got 'skip'; .*optimizer.on_non_finite, which is 'stop'",
    ),
    "another count for the others": (
        {"cls": "Muon", "only": HIDDEN, "others": AdamW(max_skipped=3), "max_skipped": 2},
        "optimizer.others.max_skipped: got 3; .*which is 2",
    ),
    "a function of nothing": ({"cls": nothing}, "optimizer.cls: nothing made a NoneType"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_are_refused_before_there_is_a_student(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TorchOptimizer(**{"lr": 1e-3, **settings})


def test_the_others_may_say_the_same_of_a_step() -> None:
    for others in (AdamW(), AdamW(clip_norm=0.5)):
        assert TorchOptimizer("Muon", 1e-3, only=HIDDEN, others=others, clip_norm=0.5).clip_norm == 0.5


@pytest.mark.parametrize(
    ("only", "message"), [((), "Muon.*2D"), (("layers.*_proj",), "optimizer.only: .*matches nothing")]
)
def test_parameters_that_it_does_not_take_are_named(only: tuple[str, ...], message: str) -> None:
    others = AdamW() if only else None
    with pytest.raises(UsageError, match=message):
        _student(TorchOptimizer("Muon", 1e-2, only=only, others=others), PLAIN, World())
