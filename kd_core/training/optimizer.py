"""Optimisers as frozen settings, from which a torch optimiser is built once the student exists."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from kd_core.errors import UsageError
from kd_core.ranges import ABOVE_0, AT_LEAST_0, NOT_NEGATIVE, SHARE_BELOW_1, check_settings
from kd_core.students.starts.name_patterns import match_names
from kd_core.training.checkpoints.checkpoint_state import trained_parameters
from kd_core.training.checkpoints.eight_bit_state import NAMES as EIGHT_BIT
from kd_core.training.checkpoints.eight_bit_state import check_blocks, optimizer_class
from kd_core.training.parameter_groups import Group, torch_groups

OnNonFinite = Literal["stop", "skip"]
# LBFGS calls the model again during a step, SparseAdam needs sparse gradients, and Optimizer is the base class.
UNSUPPORTED = ("LBFGS", "Optimizer", "SparseAdam")
# Their steps fail on tensors that are sharded over ranks, in torch 2.13.
SINGLE_RANK_ONLY = ("Adafactor", "Rprop")
# Settings of a step as a whole, whichever optimisers take it.
OF_THE_STEP = ("clip_norm", "on_non_finite", "max_skipped")
Setting = float | int | bool | str | tuple[float | None, ...] | None


@runtime_checkable
class Optimizer(Protocol):
    """The settings of an optimiser that a run reads.

    The peak learning rate is `lr`. The gradient is clipped to a norm of `clip_norm` (0: never). A step whose loss or
    gradient is not finite never moves the student. With `on_non_finite="stop"` the run then stops. With "skip" it goes
    on with the next rows, up to `max_skipped` times.
    """

    @property
    def lr(self) -> float: ...
    @property
    def clip_norm(self) -> float: ...
    @property
    def on_non_finite(self) -> OnNonFinite: ...
    @property
    def max_skipped(self) -> int: ...

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Builds the optimiser of `model`'s trainable parameters."""
        ...


def _check_common(settings: Optimizer) -> None:
    check_settings(
        settings, "optimizer.", lr=ABOVE_0, weight_decay=NOT_NEGATIVE, clip_norm=NOT_NEGATIVE, max_skipped=AT_LEAST_0
    )  # fmt: skip


@dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv 1711.05101), with weight decay on matrices only. `Optimizer` explains the last three settings.

    `groups` have rates and decay of their own, by name pattern (`embed_tokens.*`). A parameter is in one at most.
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    on_non_finite: OnNonFinite = "stop"
    max_skipped: int = 8
    groups: Mapping[str, Group] = field(default_factory=dict[str, Group])

    def __post_init__(self) -> None:
        _check_common(self)
        check_settings(self, "optimizer.", eps=ABOVE_0, betas=SHARE_BELOW_1)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.build_for(trained_parameters(model), "optimizer.groups")

    def check_names(self, model: nn.Module) -> None:
        """Checks that each pattern of `groups` matches trained parameters, without memory for them."""
        torch_groups(trained_parameters(model), self.lr, self.weight_decay, self.groups, "optimizer.groups")

    def build_for(self, named: Mapping[str, nn.Parameter], where: str) -> torch.optim.Optimizer:
        """Builds the optimiser of these parameters. `where` is the path of `groups`."""
        groups = torch_groups(named, self.lr, self.weight_decay, self.groups, where)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@dataclass(frozen=True)
class TorchOptimizer:
    """An optimiser of torch.optim by its name (`SGD`, `Muon`), of torchao (`AdamW8bit`), or one that a function builds.

    Args:
        cls: the name, or a function that takes parameter groups, `lr=` and `settings`, and returns a torch optimiser.
        lr: the peak learning rate.
        settings: further keyword arguments of `cls`.
        weight_decay: applied to matrices only.
        only: name patterns of the parameters that it optimises, such as `layers.*_proj.weight`. Without any, all.
        others: the optimiser of all other parameters. Its rate follows the same schedule, from a peak of its own.
            Settings of a step as a whole (`OF_THE_STEP`) are set here, once for both.
        clip_norm: see `Optimizer`.
        on_non_finite: see `Optimizer`.
        max_skipped: see `Optimizer`.
        groups: rates and decay of their own by name pattern, as `AdamW` has them, among the parameters of `only`.
    """

    cls: str | Callable[..., torch.optim.Optimizer]
    lr: float
    settings: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    weight_decay: float = 0.0
    only: tuple[str, ...] = ()
    others: AdamW | None = None
    clip_norm: float = 1.0
    on_non_finite: OnNonFinite = "stop"
    max_skipped: int = 8
    groups: Mapping[str, Group] = field(default_factory=dict[str, Group])

    def __post_init__(self) -> None:
        _check_common(self)
        names = [name for name, value in vars(torch.optim).items() if inspect.isclass(value)]
        supported = {*names, *EIGHT_BIT} - {*UNSUPPORTED}
        if isinstance(self.cls, str) and self.cls not in supported:
            raise UsageError(f"optimizer.cls: got {self.cls!r}; wanted one of {', '.join(sorted(supported))}.")
        if duplicates := {"lr", "weight_decay"} & set(self.settings):
            name = min(duplicates)
            raise UsageError(f"optimizer.settings: {name} has a setting of its own. Set optimizer.{name}.")
        if bool(self.only) != bool(self.others):
            raise UsageError(
                "optimizer.only, .others: wanted both or neither, because every parameter needs an optimizer."
            )
        self._refuse_others_of_the_step()
        block = self.settings.get("block_size", 1)
        if self.cls in EIGHT_BIT and (type(block) is not int or block < 1):
            raise UsageError(f"optimizer.settings.block_size: got {block!r}; wanted a whole number of at least 1.")
        # The optimiser checks its settings when it is built. Two small matrices do that before there is a student.
        self._make(torch_groups({"matrix": nn.Parameter(torch.zeros(2, 2))}, self.lr, self.weight_decay, {}, ""))
        if any(group.weight_decay for group in self.groups.values()):
            self._make(torch_groups({"matrix": nn.Parameter(torch.zeros(2, 2))}, self.lr, 1.0, {}, ""))

    def _refuse_others_of_the_step(self) -> None:
        """Raises where `others` sets otherwise how a step is clipped or skipped, which is done as a whole."""
        for name in OF_THE_STEP if self.others else ():
            value, outer_value = getattr(self.others, name), getattr(self, name)
            if value not in (outer_value, getattr(AdamW, name)):
                raise UsageError(
                    f"optimizer.others.{name}: got {value!r}; a step is clipped and skipped as a whole, by "
                    f"optimizer.{name}, which is {outer_value!r}. Set optimizer.{name}, and leave this one out."
                )

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Calls torch's class or the function.

        Raises:
            UsageError: it refuses its settings or the parameters, or does not return an optimiser.
        """
        make = self.cls
        if isinstance(make, str):
            make = optimizer_class(make) if make in EIGHT_BIT else getattr(torch.optim, make)
        name, groups = make.__name__, [group for group in groups if group["params"]]
        has_decay = not isinstance(self.cls, str) or "weight_decay" in inspect.signature(make).parameters
        if not has_decay and (decay := max(group.pop("weight_decay") for group in groups)):
            raise UsageError(f"optimizer.weight_decay: got {decay}; {name} has none.")
        try:
            optimizer = make(groups, lr=self.lr, **self.settings)
        except (TypeError, ValueError, RuntimeError) as error:
            where = "optimizer.settings" if self.settings else "optimizer"
            raise UsageError(f"{where}: {name} with {dict(self.settings)}: {error}") from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(
                f"optimizer.cls: {name} made a {type(optimizer).__name__}; wanted a torch.optim.Optimizer."
            )
        return optimizer

    def check_names(self, model: nn.Module) -> None:
        """Checks that each pattern matches trained parameters, without memory for them. Raises as `build` does."""
        named, remaining = self._divide(model)
        torch_groups(named, self.lr, self.weight_decay, self.groups, "optimizer.groups")
        if self.others is not None and remaining:
            torch_groups(remaining, 1.0, 0.0, self.others.groups, "optimizer.others.groups")

    def _divide(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Returns the parameters that this optimiser moves, and those of `others`."""
        remaining = trained_parameters(model)
        names = match_names(remaining, self.only, "optimizer.only") if self.only else list(remaining)
        named = {name: remaining.pop(name) for name in names}
        if self.cls in EIGHT_BIT:
            check_blocks(named, cast(int, self.settings.get("block_size", 256)))
        return named, remaining

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Builds one optimiser of the trainable parameters, or two behind one interface if `only` names some of them.

        Raises:
            UsageError: a pattern matches no parameter, two of `groups` match one, or the optimiser refuses a parameter.
        """
        named, remaining = self._divide(model)
        optimizer = self._make(torch_groups(named, self.lr, self.weight_decay, self.groups, "optimizer.groups"))
        if self.others is None or not remaining:
            return optimizer
        return _CombinedOptimizer(optimizer, self.others.build_for(remaining, "optimizer.others.groups"))


class _CombinedOptimizer(torch.optim.Optimizer):
    """Optimisers of disjoint parameters behind one interface, with the groups of all and one shared state."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([{"params": []}], {})
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for optimizer in self.optimizers:
            optimizer.step(closure)


def peak_rates(settings: Optimizer) -> dict[str, float]:
    """Returns peak learning rates by the names of their metrics: `lr`, and `lr/…` of groups where they differ."""
    rates = _group_rates(settings)
    second = getattr(settings, "others", None)
    if isinstance(second, AdamW):
        rates |= {"lr/others": second.lr, **{f"lr/others/{name[3:]}": lr for name, lr in _group_rates(second).items()}}
    return {"lr": settings.lr, **{name: lr for name, lr in rates.items() if lr != settings.lr}}


def _group_rates(settings: Optimizer) -> dict[str, float]:
    groups: Mapping[str, Group] = getattr(settings, "groups", {})
    return {f"lr/{pattern}": settings.lr * group.lr_scale for pattern, group in groups.items()}


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to its peak rate times the schedule's factor. A rate may be a tensor."""
    for group in optimizer.param_groups:
        lr = factor * group.setdefault("initial_lr", float(group["lr"]))
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
