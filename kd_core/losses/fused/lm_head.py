"""The output head: what makes logits of hidden states, and at which precision.

logits = cap · tanh((scale · hidden @ weight.T + bias) / cap), over the real vocabulary alone
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.losses.fused.vocab_shard import WHOLE, Part


@dataclass(frozen=True)
class LogitHead:
    """What a student does to `hidden @ weight.T`.

    Args:
        bias: added to each logit (trained where it requires a gradient).
        vocab_size: the real vocabulary; rows of `weight` beyond it are padding and enter no softmax.
        scale: factor on the product (Cohere, Granite).
        soft_cap: logits are squeezed into ±this (Gemma 2: 30). Costs one more buffer of logits.
        part: which rows of the head `weight` and `bias` are, where tensor parallelism divides them.
    """

    bias: Float[Tensor, " V"] | None = None
    vocab_size: int | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    part: Part = WHOLE

    def __post_init__(self) -> None:
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise UsageError(f"head.soft_cap: got {self.soft_cap}; wanted more than 0, or None.")


class Precision(NamedTuple):
    """`multiply` is the dtype of the factors of a matmul, `keep` that of logits and gradients: float32 at least."""

    multiply: torch.dtype
    keep: torch.dtype

    @classmethod
    def of(cls, hidden: Tensor) -> "Precision":
        """Of autocast where it is on, else of the hidden states; float64 stays float64."""
        device = hidden.device.type
        multiply = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if hidden.dtype == torch.float64:
            multiply = torch.float64
        return cls(multiply, torch.float64 if multiply == torch.float64 else torch.float32)

    def backward_dtype(self, device: torch.device) -> torch.dtype:
        """Of a gradient's factors. On a CPU bfloat16 twice as fast as the mixed way; gradients need no more."""
        rounded = device.type != "cpu" or self.multiply == torch.bfloat16
        return self.multiply if rounded else self.keep


@contextlib.contextmanager
def matmul_in(precision: Precision, device: torch.device) -> Generator[None]:
    """On a CPU, let float32 matmuls multiply in bfloat16 and add up in float32: bf16 speed, float32 logits."""
    if device.type != "cpu" or precision.multiply != torch.bfloat16:
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class Head(NamedTuple):
    """A head of the real vocabulary's rows alone: weight as it is, bias in the dtype that is kept.

    `vocab_size` counts the rows of all parts, `weight` has those of this one.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None
    precision: Precision
    part: Part
    vocab_size: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, form: LogitHead, precision: Precision) -> "Head":
        """Cut to the real vocabulary."""
        V = len(weight) if form.vocab_size is None else form.vocab_size
        if form.part.group is None and len(weight) < V:
            raise UsageError(f"head.vocab_size: got {V}; wanted at most the {len(weight)} rows of the weight.")
        rows = form.part.rows(len(weight), V)
        part = replace(form.part, padding=rows == 0)
        rows = max(rows, 1)
        cut = None if bias is None else bias[:rows].to(precision.keep)
        return cls(weight[:rows], cut, form.scale, form.soft_cap, precision, part, V)

    def finish_(self, product: Tensor, bias: Tensor | None) -> Tensor | None:
        """Turn hidden @ weight.T into logits; returns what their gradient is multiplied by, where capped."""
        if self.scale != 1:
            product.mul_(self.scale)
        if bias is not None:
            product.add_(bias)
        if self.soft_cap is None:
            return None
        product.div_(self.soft_cap).tanh_()
        slope = 1 - product.square()
        product.mul_(self.soft_cap)
        return slope


class HeadGradients(NamedTuple):
    """By hidden states, weight and bias, added up over chunks in the dtype that is kept; None for what is frozen."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, keep: torch.dtype) -> "HeadGradients":
        """Nothing added yet; `hidden` is written chunk by chunk."""
        of_weight, of_bias = (None if part is None else torch.zeros_like(part, dtype=keep) for part in (weight, bias))
        return cls(torch.empty_like(hidden, dtype=keep), of_weight, of_bias)
