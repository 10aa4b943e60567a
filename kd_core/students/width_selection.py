"""What a narrower student keeps: the most important channels and heads, in the order in which they are stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.student import ShardingRule, Student
from kd_core.students.width_importance import KV_COLUMNS, NORMS, STREAM_NORMS, WidthImportance, split_name

WIDTHS = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")


@dataclass(frozen=True)
class WidthSelection:
    """Parts of a model that a student keeps. Indices are increasing, and count in the model.

    Args:
        arch: the student's architecture.
        layers: the layers, in the student's order.
        hidden: channels of the residual stream.
        feed_forward: feed-forward channels of each layer.
        heads: query heads of each layer.
        kv_heads: key and value heads of each layer.
        factors: factors on the gains of norms, and on the embedding, by module in the student. A missing one is 1.
        shares: how much of the importance is kept, by the name of the size.
    """

    arch: Architecture
    layers: tuple[int, ...]
    hidden: Int[Tensor, " D"]
    feed_forward: list[Int[Tensor, " I"]]
    heads: list[Int[Tensor, " H"]]
    kv_heads: list[Int[Tensor, " G"]]
    factors: dict[str, float]
    shares: dict[str, float]

    def indices(self, name: str, shape: Sequence[int], rules: Mapping[str, ShardingRule]) -> list[Int[Tensor, " n"]]:
        """Returns the indices to keep in each dimension of a parameter of the model.

        Args:
            name: the parameter's name in the student.
            shape: the parameter's shape in the model.
            rules: the student's `sharding_rules`, which say between which channels a module maps.
        """
        module, _, kind = name.rpartition(".")
        layer, inner = split_name(module)
        rule = rules[inner]
        if rule in ("embedding", "lm_head"):
            return [torch.arange(shape[0]), self.hidden]
        if rule == "head_norm":
            return [torch.arange(shape[0])]
        if layer is None or rule in STREAM_NORMS:
            return [self.hidden]
        # Linear layers of a block map hidden channels to channels inside attention or feed-forward, or back. Norms
        # inside attention, and biases, have as many values as outputs.
        inside = self._inside(layer, inner, rule)
        outputs, inputs = (self.hidden, inside) if rule == "rows" else (inside, self.hidden)
        return [outputs, inputs] if kind == "weight" and rule not in NORMS else [outputs]

    def _inside(self, layer: int, inner: str, rule: ShardingRule) -> Int[Tensor, " n"]:
        if inner.startswith("mlp."):
            return self.feed_forward[layer]
        # Channels of the kept heads.  [H] → [H·d]
        heads = self.kv_heads[layer] if rule in KV_COLUMNS else self.heads[layer]
        return (heads[:, None] * self.arch.head_dim + torch.arange(self.arch.head_dim)).flatten()


def _most_important(importance: Float[Tensor, "*B C"], count: int) -> Int[Tensor, "*B n"]:
    """Returns the indices of the `count` largest values, increasing. Of equal values the first are taken."""
    order = importance.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def _most_important_heads(importance: Float[Tensor, " H"], arch: Architecture, groups: int) -> tuple[Tensor, Tensor]:
    """Returns the query heads and kv heads of a layer that stay, out of `groups` kv heads.

    Whole groups of a kv head stay, by the sum of their heads. In each of them, as many query heads stay.
    """
    # Groups of query heads that share a kv head, and their sums.  [H] → [H_kv, H / H_kv]
    by_group = importance.view(groups, -1)
    kv_heads = _most_important(by_group.sum(dim=-1), arch.num_kv_heads)
    members = _most_important(by_group[kv_heads], arch.num_heads // arch.num_kv_heads)
    # Number of a head in the model: the first head of its group, plus its place in the group.
    return (kv_heads[:, None] * by_group.shape[1] + members).flatten(), kv_heads


def narrower(arch: Architecture, widths: Mapping[str, int | None]) -> Architecture:
    """Returns the architecture with smaller widths. Those that are None stay, and query heads go with their kv heads.

    Raises:
        UsageError: a width is larger than the model's, or heads do not divide.
    """
    sizes = {name: size for name, size in widths.items() if size is not None}
    most = arch.num_heads // arch.num_kv_heads  # query heads of a kv head
    if "num_kv_heads" in sizes and "num_heads" not in sizes:
        sizes["num_heads"] = sizes["num_kv_heads"] * most
    for name, size in sizes.items():
        if not 1 <= size <= getattr(arch, name):
            raise UsageError(f"--{name}={size}: wanted 1 to {getattr(arch, name)}, which the model has.")
    narrow = replace(arch, **sizes)
    if narrow.num_heads % narrow.num_kv_heads or narrow.num_heads > narrow.num_kv_heads * most:
        choices = ", ".join(str(narrow.num_kv_heads * members) for members in range(1, most + 1))
        raise UsageError(
            f"--num_heads={narrow.num_heads}: wanted {choices}, so that each of {narrow.num_kv_heads} kv heads has as "
            f"many, and at most the model's {most}. Whole groups go with --num_kv_heads."
        )
    return narrow


def _kept_share(importance: Sequence[Tensor], indices: Sequence[Tensor]) -> float:
    """Returns the mean over layers of the share of the importance that is kept."""
    shares = [values[index].sum() / values.sum() for values, index in zip(importance, indices, strict=True)]
    return float(sum(shares)) / len(shares)


def _factors(selection: WidthSelection, importance: WidthImportance, model: Student) -> dict[str, float]:
    """Returns the factors that let norms and the embedding of fewer channels give the model's values on average.

    A norm gives its channels a mean square of 1, and that of the kept ones was another. An embedding that is multiplied
    by the root of its size (Gemma) is multiplied by too little. Where it is the lm_head too, the norm before that takes
    it back.
    """
    rules, factors = model.sharding_rules(), dict[str, float]()
    for name, squares in importance.energy.items():
        (channels,) = selection.indices(f"{name}.weight", squares.shape, rules)
        # Where all channels stay, all bits stay.
        if len(channels) < len(squares):
            factors[name] = float(squares[channels].mean().sqrt())
    if model.arch.root_scaled_embedding and len(selection.hidden) < model.arch.hidden_size:
        factors["embed_tokens"] = (model.arch.hidden_size / len(selection.hidden)) ** 0.5
        if model.arch.tie_embeddings:
            factors["norm"] /= factors["embed_tokens"]
    return factors


def select_widths(
    importance: WidthImportance, model: Student, arch: Architecture, layers: tuple[int, ...]
) -> WidthSelection:
    """Returns what a student takes of a model.

    Args:
        importance: that of the model's `layers`.
        model: the model.
        arch: the model's architecture with the student's widths.
        layers: the layers that stay.
    """
    hidden = _most_important(importance.hidden, arch.hidden_size)
    feed_forward = [_most_important(channels, arch.intermediate_size) for channels in importance.feed_forward]
    heads = [_most_important_heads(heads, arch, model.arch.num_kv_heads) for heads in importance.heads]
    query_heads = [query for query, _ in heads]
    selection = WidthSelection(
        arch=arch.with_layers(layers),
        layers=layers,
        hidden=hidden,
        feed_forward=feed_forward,
        heads=query_heads,
        kv_heads=[kv for _, kv in heads],
        factors={},
        shares={
            "hidden_size": _kept_share([importance.hidden], [hidden]),
            "intermediate_size": _kept_share(importance.feed_forward, feed_forward),
            "num_heads": _kept_share(importance.heads, query_heads),
        },
    )
    return replace(selection, factors=_factors(selection, importance, model))
