"""Which channels and heads a narrower student keeps: the most important ones, in the order in which they are stored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.width_importance import WidthImportance

WIDTHS = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")


@dataclass(frozen=True)
class KeptWidth:
    """What a student keeps of a model. Indices are increasing, and count in the model.

    Args:
        arch: the student's architecture.
        layers: the layers, in the student's order.
        hidden: channels of the residual stream.
        feed_forward: feed-forward channels, for each of `layers`.
        heads: query heads, for each of `layers`.
        kv_heads: key and value heads, for each of `layers`.
        gains: factors on the gains of norms, by the norm's name in the model. A missing one is 1.
        shares: how much of the importance is kept, by the name of the size.
    """

    arch: Architecture
    layers: tuple[int, ...]
    hidden: Int[Tensor, " D"]
    feed_forward: tuple[Int[Tensor, " I"], ...]
    heads: tuple[Int[Tensor, " H"], ...]
    kv_heads: tuple[Int[Tensor, " G"], ...]
    gains: dict[str, float]
    shares: dict[str, float]


def _most_important(importance: Float[Tensor, "... C"], count: int) -> Int[Tensor, "... count"]:
    """Returns the indices of the `count` largest values, increasing. Of equal values the first are taken."""
    order = importance.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def _kept_heads(importance: Float[Tensor, " H"], arch: Architecture, kept: Architecture) -> tuple[Tensor, Tensor]:
    """Returns the kept query heads and kv heads of a layer.

    Whole groups of a kv head stay, by the sum of their heads. In each, as many query heads stay.
    """
    # Groups of query heads that share a kv head, and their sums.  [H] → [H_kv, H / H_kv]
    by_group = importance.view(arch.num_kv_heads, -1)
    groups = _most_important(by_group.sum(dim=-1), kept.num_kv_heads)
    members = _most_important(by_group[groups], kept.num_heads // kept.num_kv_heads)
    # Number of a head in the model: its group's first head plus its place in the group.
    return (groups[:, None] * by_group.shape[1] + members).flatten(), groups


def narrower(arch: Architecture, widths: dict[str, int | None]) -> Architecture:
    """Returns the architecture with smaller widths. Widths that are None stay, and heads follow kv heads.

    Raises:
        UsageError: a width is larger than the model's, or heads do not divide.
    """
    sizes = {name: size for name, size in widths.items() if size is not None}
    # Without a number of heads, groups keep their size.
    if "num_kv_heads" in sizes and "num_heads" not in sizes:
        sizes["num_heads"] = sizes["num_kv_heads"] * (arch.num_heads // arch.num_kv_heads)
    for name, size in sizes.items():
        if not 1 <= size <= getattr(arch, name):
            raise UsageError(f"--{name}={size}: wanted 1 to {getattr(arch, name)}, which the model has.")
    kept = replace(arch, **sizes)
    group, most = divmod(kept.num_heads, kept.num_kv_heads), arch.num_heads // arch.num_kv_heads
    if group[1] or group[0] > most:
        raise UsageError(
            f"--num_heads={kept.num_heads}: wanted 1 to {most} heads for each of {kept.num_kv_heads} kv heads, the "
            f"same number for all, such as {kept.num_kv_heads * most}. Groups go with --num_kv_heads."
        )
    return kept


def _kept_share(importance: Sequence[Tensor], kept: Sequence[Tensor]) -> float:
    """Returns the mean over layers of the share of the importance that is kept."""
    shares = [values[index].sum() / values.sum() for values, index in zip(importance, kept, strict=True)]
    return float(sum(shares)) / len(shares)


def select_widths(
    importance: WidthImportance, arch: Architecture, kept: Architecture, layers: Sequence[int]
) -> KeptWidth:
    """Returns what a student of architecture `kept` takes of a model of architecture `arch`.

    The gain of a norm is multiplied by the root mean square of the kept channels, where that of all is 1. So the
    narrower norm gives the values of the model's on average. Where all channels stay, no gain changes.
    """
    hidden = _most_important(importance.hidden, kept.hidden_size)
    feed_forward = [_most_important(importance.feed_forward[layer], kept.intermediate_size) for layer in layers]
    heads, kv_heads = zip(*(_kept_heads(importance.heads[layer], arch, kept) for layer in layers), strict=True)
    energy = importance.energy if kept.hidden_size < arch.hidden_size else {}
    return KeptWidth(
        arch=kept.with_layers(tuple(layers)),
        layers=tuple(layers),
        hidden=hidden,
        feed_forward=tuple(feed_forward),
        heads=heads,
        kv_heads=kv_heads,
        gains={name: float(squares[hidden].mean().sqrt()) for name, squares in energy.items()},
        shares={
            "hidden_size": _kept_share([importance.hidden], [hidden]),
            "intermediate_size": _kept_share([importance.feed_forward[layer] for layer in layers], feed_forward),
            "num_heads": _kept_share([importance.heads[layer] for layer in layers], heads),
        },
    )
