"""Parameter groups of an optimiser: matrices and vectors, and rates and decay of their own by name pattern."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kd_core.errors import UsageError
from kd_core.ranges import ABOVE_0, NOT_NEGATIVE, check_settings
from kd_core.students.starts.name_patterns import match_names


@dataclass(frozen=True)
class Group:
    """Settings of the parameters whose names match a pattern.

    Args:
        lr_scale: factor on the optimiser's learning rate.
        weight_decay: decay of their matrices. None: the optimiser's.
    """

    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_settings(self, "optimizer.groups.", lr_scale=ABOVE_0, weight_decay=NOT_NEGATIVE)


def divide_parameters(
    named: Mapping[str, nn.Parameter], groups: Mapping[str, Group], where: str
) -> dict[str | None, dict[str, nn.Parameter]]:
    """Divides parameters by the pattern that matches them, None for those that no pattern matches.

    Raises:
        UsageError: a pattern matches nothing, or two match the same parameter. Their order has no meaning.
    """
    pattern_of = dict[str, str]()
    for pattern, group in groups.items():
        names = match_names(named, (pattern,), where)
        for name in names:
            if (other := pattern_of.setdefault(name, pattern)) != pattern:
                raise UsageError(f"{where}: {name} matches {other!r} and {pattern!r}; wanted one. Narrow one of them.")
        if group.weight_decay and all(named[name].ndim < 2 for name in names):
            raise UsageError(
                f"{where}.{pattern}.weight_decay: got {group.weight_decay}; it matches no matrix, and nothing else "
                "decays. Leave it out."
            )
    return {
        pattern: {name: parameter for name, parameter in named.items() if pattern_of.get(name) == pattern}
        for pattern in (None, *groups)
    }


def torch_groups(
    named: Mapping[str, nn.Parameter], lr: float, weight_decay: float, groups: Mapping[str, Group], where: str
) -> list[dict[str, Any]]:
    """Returns groups as torch's optimisers take them, two for each pattern: matrices, and vectors without decay.

    Raises:
        UsageError: as in `divide_parameters`.
    """
    divided: list[dict[str, Any]] = []
    for pattern, members in divide_parameters(named, groups, where).items():
        group = Group() if pattern is None else groups[pattern]
        decay = weight_decay if group.weight_decay is None else group.weight_decay
        rate = {} if group.lr_scale == 1 else {"lr": lr * group.lr_scale}
        parameters = list(members.values())
        divided += [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay, **rate},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, **rate},
        ]
    return divided
