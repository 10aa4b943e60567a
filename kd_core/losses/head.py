"""The output head: from hidden states to logits in a buffer, and from their gradient back, at the right precision.

logits = cap · tanh((scale · hidden @ weight.T + bias) / cap), over the real vocabulary alone
"""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.errors import UsageError

BLOCK_ROWS = 1024


@dataclass(frozen=True)
class LogitHead:
    """What a student does to `hidden @ weight.T`.

    Args:
        bias: added to each logit (trained where it requires a gradient).
        vocab_size: the real vocabulary; rows of `weight` beyond it are padding and enter no softmax.
        scale: factor on the product (Cohere, Granite).
        soft_cap: logits are squeezed into ±this (Gemma 2: 30). Costs one more buffer of logits.
    """

    bias: Float[Tensor, " V"] | None = None
    vocab_size: int | None = None
    scale: float = 1.0
    soft_cap: float | None = None

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

    def factor(self, x: Tensor) -> Tensor:
        """A factor of logits: on a CPU the multiplication itself rounds (`matmul_in`), so that they stay float32."""
        return x.to(self.keep if x.device.type == "cpu" else self.multiply)

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


def matmul(a: Tensor, b: Tensor, keep: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b of two factors, added up in `keep` and returned in it (rounded once, on a CPU without such a product)."""
    if a.dtype == keep or (a.device.type == "cpu" and out is not None):
        return torch.mm(a, b, out=out)
    return torch.mm(a, b) if a.device.type == "cpu" else torch.mm(a, b, out_dtype=keep, out=out)


class Weights(NamedTuple):
    """The head's numbers in working precision, the real vocabulary's alone."""

    weight: Tensor
    backward_weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None
    precision: Precision

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, head: LogitHead, precision: Precision) -> "Weights":
        """Cut and cast."""
        V = len(weight) if head.vocab_size is None else head.vocab_size
        if len(weight) < V:
            raise UsageError(f"head.vocab_size: got {V}; wanted at most the {len(weight)} rows of the weight.")
        cast = None if bias is None else bias[:V].to(precision.keep)
        backward = weight[:V].to(precision.backward_dtype(weight.device))
        return cls(precision.factor(weight[:V]), backward, cast, head.scale, head.soft_cap, precision)

    def logits_(self, hidden: Tensor, out: Tensor) -> Tensor | None:
        """Write the logits of `hidden` to `out`; returns what their gradient is multiplied by, where capped."""
        matmul(self.precision.factor(hidden), self.weight.t(), self.precision.keep, out=out)
        if self.scale != 1:
            out.mul_(self.scale)
        if self.bias is not None:
            out.add_(self.bias)
        if self.soft_cap is None:
            return None
        out.div_(self.soft_cap).tanh_()
        slope = 1 - out.square()
        out.mul_(self.soft_cap)
        return slope


@dataclass
class HeadGradients:
    """By hidden states, weight and bias, added up over chunks in working precision."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scratch: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, keep: torch.dtype) -> "HeadGradients":
        """Nothing added yet; `hidden` is written chunk by chunk."""
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=keep)
        return cls(torch.empty_like(hidden, dtype=keep), torch.zeros_like(weight, dtype=keep), of_bias)

    def _kept(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """A scratch tensor that chunks share: fresh memory costs more than what is written to it."""
        if name not in self.scratch:
            self.scratch[name] = like.new_empty(shape)
        return self.scratch[name][: shape[0]]

    def add_(self, rows: slice, hidden: Tensor, by_logits: Tensor, head: Weights) -> None:
        """Add a chunk: `by_logits` is the gradient by scale · hidden @ weight.T + bias."""
        keep, V = head.precision.keep, len(head.weight)
        if self.bias is not None:
            self.bias[:V] += by_logits.sum(dim=0)
        if head.scale != 1:
            by_logits.mul_(head.scale)
        factor = head.backward_weight
        hidden = hidden.to(factor.dtype)
        if factor.dtype == keep:
            self.hidden[rows] = matmul(by_logits, factor, keep)
            self.weight[:V].addmm_(by_logits.t(), hidden)
            return
        rounded = self._kept("rounded", by_logits.shape, factor).copy_(by_logits)
        self.hidden[rows] = matmul(rounded, factor, keep)
        if factor.device.type != "cpu":
            self.weight[:V] += matmul(rounded.t(), hidden, keep)
            return
        product = matmul(rounded.t(), hidden, keep, out=self._kept("product", factor.shape, factor))
        # Adding bfloat16 to float32 makes a float32 copy first: in blocks it stays in the processor's cache.
        for total, block in zip(self.weight[:V].split(BLOCK_ROWS), product.split(BLOCK_ROWS), strict=True):
            total.add_(block)
