"""Optimisers as plain settings that make a torch optimiser once the student exists."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kd_core.errors import UsageError
from kd_core.ranges import ABOVE_0, AT_LEAST_0, NOT_NEGATIVE, SHARE_BELOW_1, check_ranges
from kd_core.students.starts.name_patterns import matching
from kd_core.training.checkpoints.checkpoint_state import trained

ON_NON_FINITE = ("stop", "skip")
# They take a step by calling the model again, or want sparse gradients.
UNFIT = ("LBFGS", "Optimizer", "SparseAdam")
# Torch 2.13 cannot take their steps on tensors that are spread over ranks.
ALONE = ("Adafactor", "Rprop")
# Settings of a step as a whole, whichever optimisers take it.
OF_THE_STEP = ("clip_norm", "on_non_finite", "max_skipped")
Setting = float | int | bool | str | tuple[float | None, ...] | None


@runtime_checkable
class Optimizer(Protocol):
    """Settings of an optimiser, as a run uses them.

    The peak rate is `lr`; the gradient is clipped to `clip_norm` (0: never). A step whose loss or gradient is not
    finite never moves the student. The run then stops, or skips the step (`on_non_finite`) and goes on with the next
    rows, up to `max_skipped` times.
    """

    @property
    def lr(self) -> float: ...
    @property
    def clip_norm(self) -> float: ...
    @property
    def on_non_finite(self) -> str: ...
    @property
    def max_skipped(self) -> int: ...

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of `model`'s trainable parameters."""
        ...


def _check_common(part: Optimizer) -> None:
    if part.on_non_finite not in ON_NON_FINITE:
        raise UsageError(
            f"optimizer.on_non_finite: got {part.on_non_finite!r}; wanted one of {', '.join(ON_NON_FINITE)}."
        )
    check_ranges(
        part, "optimizer.", lr=ABOVE_0, weight_decay=NOT_NEGATIVE, clip_norm=NOT_NEGATIVE, max_skipped=AT_LEAST_0
    )  # fmt: skip


def _groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv 1711.05101), with weight decay on matrices only. The last three are those of `Optimizer`."""

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    on_non_finite: str = "stop"
    max_skipped: int = 8

    def __post_init__(self) -> None:
        _check_common(self)
        check_ranges(self, "optimizer.", eps=ABOVE_0, betas=SHARE_BELOW_1)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See `Optimizer`."""
        return self.over(list(trained(model).values()))

    def over(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of some parameters."""
        groups = _groups(parameters, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@dataclass(frozen=True)
class TorchOptimizer:
    """An optimiser of torch.optim by its name (`SGD`, `Adafactor`, `Muon`), or one that a function makes.

    Args:
        cls: the name, or a function of parameter groups, `lr=` and the settings to a torch optimiser.
        lr: the peak rate.
        settings: its further arguments, by their names there.
        weight_decay: on matrices only.
        only: patterns on the names of the parameters that are its own: `layers.*_proj.weight`; none: all are.
        others: of all others. Their rate follows the same schedule, from a peak of their own. What is said of a step
            as a whole (`OF_THE_STEP`) is said here, once for both.
        clip_norm: see `Optimizer`.
        on_non_finite: see `Optimizer`.
        max_skipped: see `Optimizer`.
    """

    cls: str | Callable[..., torch.optim.Optimizer]
    lr: float
    settings: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    weight_decay: float = 0.0
    only: tuple[str, ...] = ()
    others: AdamW | None = None
    clip_norm: float = 1.0
    on_non_finite: str = "stop"
    max_skipped: int = 8

    def __post_init__(self) -> None:
        _check_common(self)
        known = {name for name, each in vars(torch.optim).items() if inspect.isclass(each)} - {*UNFIT}
        if isinstance(self.cls, str) and self.cls not in known:
            raise UsageError(f"optimizer.cls: got {self.cls!r}; wanted one of {', '.join(sorted(known))}.")
        if own := {"lr", "weight_decay"} & set(self.settings):
            name = min(own)
            raise UsageError(f"optimizer.settings: {name} stands beside them. Set optimizer.{name}.")
        if bool(self.only) != bool(self.others):
            raise UsageError("optimizer.only, .others: wanted both, or none: what is not its own must have another.")
        self._refuse_others_of_the_step()
        # Its own checks of its settings, on two matrices, before there is a student.
        self._make([nn.Parameter(torch.zeros(2, 2)) for _ in range(2)])

    def _refuse_others_of_the_step(self) -> None:
        """A step is clipped and skipped as a whole, so `others` cannot say otherwise."""
        for name in OF_THE_STEP if self.others else ():
            said, own = getattr(self.others, name), getattr(self, name)
            if said not in (own, getattr(AdamW, name)):
                raise UsageError(
                    f"optimizer.others.{name}: got {said!r}; a step is clipped and skipped as a whole, by "
                    f"optimizer.{name}, which is {own!r}. Set optimizer.{name}, and leave this one out."
                )

    def _make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Call torch's class or the function.

        Raises:
            UsageError: it refuses its settings or the parameters, or makes no optimiser.
        """
        make = getattr(torch.optim, self.cls) if isinstance(self.cls, str) else self.cls
        name, groups = make.__name__, _groups(parameters, self.weight_decay)
        if isinstance(self.cls, str) and "weight_decay" not in inspect.signature(make).parameters:
            if self.weight_decay:
                raise UsageError(f"optimizer.weight_decay: got {self.weight_decay}; {name} has none.")
            groups = [{"params": group["params"]} for group in groups]
        try:
            made = make([group for group in groups if group["params"]], lr=self.lr, **self.settings)
        except (TypeError, ValueError, RuntimeError) as error:
            where = "optimizer.settings" if self.settings else "optimizer"
            raise UsageError(f"{where}: {name} with {dict(self.settings)}: {error}") from error
        if not isinstance(made, torch.optim.Optimizer):
            raise UsageError(f"optimizer.cls: {name} made a {type(made).__name__}; wanted a torch.optim.Optimizer.")
        return made

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """See `Optimizer`.

        Raises:
            UsageError: a pattern fits nothing, or the optimiser does not take a parameter.
        """
        named = trained(model)
        own = matching(named, self.only, "optimizer.only") if self.only else list(named)
        made = self._make([named[name] for name in own])
        left = [parameter for name, parameter in named.items() if name not in {*own}]
        if self.others is None or not left:
            return made
        return _Both(made, self.others.over(left))


class _Both(torch.optim.Optimizer):
    """Two optimisers of different parameters as one: their groups, and one state that both write to."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([{"params": []}], {})
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let both take a step."""
        for part in self.parts:
            part.step(closure)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its peak rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
