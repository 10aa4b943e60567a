"""Importance of a decoder's widths, measured on text by activations alone (Minitron, arXiv 2407.14679).

    hidden channels         |outputs| of the norms on the residual stream, averaged over these norms
    feed-forward channels   |inputs| of down_proj, in each layer
    query heads             L2 norms of the heads' outputs, which are the inputs of o_proj, in each layer

Means over the positions of a row, then root mean squares over rows, which the paper found best. No number depends on
how rows are batched.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_core.errors import UsageError
from kd_core.students.layer_importance import LayerwiseText
from kd_core.students.student import Student

DOWN, OUTPUT = "mlp.down_proj", "self_attn.o_proj"
# Rules of modules: norms on the residual stream and on what is added to it, and norms over all attention heads at once.
STREAM_NORMS = frozenset(("norm", "residual_norm"))
KV_COLUMNS = frozenset(("kv_columns", "normed_kv_columns", "kv_columns_norm"))
NORMS = STREAM_NORMS | {"columns_norm", "kv_columns_norm"}
PRUNABLE = NORMS | KV_COLUMNS | {"embedding", "columns", "rows", "head_norm", "lm_head"}


@dataclass(frozen=True)
class WidthImportance:
    """Importance of each channel and attention head, in float64 on the CPU.

    Args:
        hidden: of the channels of the residual stream.
        feed_forward: of the feed-forward channels of each layer that ran.
        heads: of the query heads of each layer that ran.
        energy: of each norm: mean squares of its input's channels, at a mean square of 1 in each position. Names are
            those in a student of the layers that ran.
    """

    hidden: Float[Tensor, " D"]
    feed_forward: list[Float[Tensor, " I"]]
    heads: list[Float[Tensor, " H"]]
    energy: dict[str, Float[Tensor, " D"]]


@dataclass
class _RowSums:
    """Sums over rows, by the name of a module."""

    rows: int = 0
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    energies: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, magnitudes: Float[Tensor, "B T C"]) -> None:
        # Mean over positions, squared, summed over rows.  [B, T, C] → [C]
        squares = magnitudes.mean(dim=1, dtype=torch.float64).square().sum(dim=0).cpu()
        self.magnitudes[name] = self.magnitudes.get(name, 0) + squares

    def add_norm(self, name: str, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.add(name, output.abs())
        # Squares at a mean square of 1 in each position, mean over positions, summed over rows.  [B, T, D] → [D]
        squares = args[0].double().square()
        shares = squares / squares.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        self.energies[name] = self.energies.get(name, 0) + shares.mean(dim=1).sum(dim=0).cpu()

    def add_input(self, name: str, head_dim: int, _: nn.Module, args: tuple[Tensor]) -> None:
        # L2 norms of attention heads, or absolute values where a head is one channel.  [B, T, H·d] → [B, T, H]
        heads = rearrange(args[0], "B T (H d) -> B T H d", d=head_dim)
        self.add(name, heads.norm(dim=-1, dtype=torch.float64) if head_dim > 1 else heads[..., 0].abs())

    def importance(self, name: str) -> Float[Tensor, " C"]:
        return (self.magnitudes[name] / self.rows).sqrt()


def split_name(name: str) -> tuple[int | None, str]:
    """Returns the layer of a module or parameter and its name in the block. Outside of blocks the layer is None."""
    if not name.startswith("layers."):
        return None, name
    _, layer, inner = name.split(".", 2)
    return int(layer), inner


def check_prunable(model: Student) -> None:
    """Checks that every module with parameters is of a kind whose widths can be cut.

    Raises:
        UsageError: one is not, such as a router or experts.
    """
    rules = model.sharding_rules()
    for name, _ in model.named_parameters():
        module = split_name(name.rpartition(".")[0])[1]
        if rules.get(module) not in PRUNABLE:
            raise UsageError(
                f"{module}: the widths of {model.arch.family} cannot be pruned, as it has this module. Drop layers "
                "alone: student.keep_layers, which launchers.importance measures."
            )


def _hook(model: Student, layers: Sequence[int], sums: _RowSums, stack: ExitStack) -> None:
    """Hooks all modules that are measured, until `stack` is closed. Sums are by the names of a student of `layers`."""
    rules = model.sharding_rules()
    modules = {name: module for name, module in model.named_children() if name != "layers"}
    for position, layer in enumerate(layers):
        block = model.layers[layer].named_modules()
        modules |= {f"layers.{position}.{inner}": module for inner, module in block if inner}
    for name, module in modules.items():
        inner = split_name(name)[1]
        if rules.get(inner) in NORMS and isinstance(getattr(module, "weight", None), Tensor):
            stack.enter_context(module.register_forward_hook(partial(sums.add_norm, name)))
        elif inner in (DOWN, OUTPUT):
            head_dim = model.arch.head_dim if inner == OUTPUT else 1
            stack.enter_context(module.register_forward_pre_hook(partial(sums.add_input, name, head_dim)))


@torch.no_grad()
def measure_widths(
    model: Student, layers: Sequence[int], batches: Iterable[Int[Tensor, "_ S"]], report: Callable[[int], object]
) -> WidthImportance:
    """Returns the importance of the widths of these layers, in one pass over the text.

    Args:
        model: the model.
        layers: the layers that run, in this order.
        batches: rows of tokens of one document each.
        report: called with the number of tokens of each batch that is done.

    Raises:
        UsageError: the widths of this family cannot be pruned.
    """
    check_prunable(model)
    sums = _RowSums()
    with ExitStack() as stack:
        _hook(model, layers, sums, stack)
        for tokens in batches:
            text = LayerwiseText(model, tokens)
            x = text.embedded
            for layer in layers:
                x = text.run_layer(layer, x)
            model.last_hidden(x)
            sums.rows += len(tokens)
            report(tokens.numel())
    stream_norms = [name for name in sums.energies if model.sharding_rules()[split_name(name)[1]] in STREAM_NORMS]
    return WidthImportance(
        hidden=torch.stack([sums.importance(name) for name in stream_norms]).mean(dim=0),
        feed_forward=[sums.importance(f"layers.{position}.{DOWN}") for position in range(len(layers))],
        heads=[sums.importance(f"layers.{position}.{OUTPUT}") for position in range(len(layers))],
        energy={name: energy / sums.rows for name, energy in sums.energies.items()},
    )
