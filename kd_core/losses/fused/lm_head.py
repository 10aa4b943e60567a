"""The output head: the dtypes of its matmuls, and what turns a product into logits.

logits = cap · tanh((scale · hidden @ weight.T + bias) / cap)        over the real vocabulary alone
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.logit_products import chunk_positions
from kd_core.losses.fused.vocab_shard import VocabShard
from kd_core.types import LmHeadForm


class MatmulPrecision(NamedTuple):
    """Dtypes of the head's matmuls.

    `matmul_dtype` is that of their factors. `accum_dtype` is that of logits and gradients, float32 at least.
    """

    matmul_dtype: torch.dtype
    accum_dtype: torch.dtype

    @classmethod
    def from_hidden(cls, hidden: Tensor) -> "MatmulPrecision":
        """Takes the dtype of autocast where it is on, else that of the hidden states. float64 stays float64."""
        device = hidden.device.type
        matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if hidden.dtype == torch.float64:
            matmul_dtype = torch.float64
        return cls(matmul_dtype, torch.float64 if matmul_dtype == torch.float64 else torch.float32)


class LmHead(NamedTuple):
    """An lm_head cut to the real vocabulary: the weight in its own dtype, the bias in `accum_dtype`.

    `vocab_size` counts the rows of all shards. `weight` and `bias` have those of this shard.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None
    precision: MatmulPrecision
    shard: VocabShard
    vocab_size: int

    def chunk_positions(self) -> int:
        """Returns the positions of a chunk where the objective sets none. Ranks that share the vocabulary agree."""
        ranks = 1 if self.shard.group is None else self.shard.group.size()
        return chunk_positions(-(-self.vocab_size // ranks), self.weight.device)

    @classmethod
    def from_weight(cls, weight: Tensor, form: LmHeadForm, shard: VocabShard, precision: MatmulPrecision) -> "LmHead":
        """Cuts weight and bias to the rows of real tokens.

        Raises:
            UsageError: the whole weight has fewer rows than the vocabulary has tokens.
        """
        V = len(weight) if form.vocab_size is None else form.vocab_size
        if shard.group is None and len(weight) < V:
            raise UsageError(f"head.vocab_size: got {V}; wanted at most the {len(weight)} rows of the weight.")
        # A shard of nothing but padding keeps one row, so that no tensor is empty.
        rows = shard.rows(len(weight), V)
        shard = replace(shard, padding=rows == 0)
        rows = max(rows, 1)
        real_bias = None if form.bias is None else form.bias[:rows].to(precision.accum_dtype)
        return cls(weight[:rows], real_bias, form.scale, form.soft_cap, precision, shard, V)

    def to_logits_(self, product: Tensor, bias: Tensor | None) -> Tensor | None:
        """Turns hidden @ weight.T into logits, in place.

        Returns:
            The derivative of the soft cap, by which a gradient of the logits is multiplied. None without a soft cap.
        """
        if self.scale != 1:
            product.mul_(self.scale)
        if bias is not None:
            product.add_(bias)
        if self.soft_cap is None:
            return None
        # d/dx of c · tanh(x / c) is 1 − tanh²(x / c).
        product.div_(self.soft_cap).tanh_()
        slope = 1 - product.square()
        product.mul_(self.soft_cap)
        return slope


class LmHeadGradients(NamedTuple):
    """Gradients by hidden states, weight and bias in `accum_dtype`, or None for what is frozen.

    Those of weight and bias are added up over chunks. Rows of the hidden states' gradient are written chunk by chunk.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def allocate(
        cls, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, accum_dtype: torch.dtype
    ) -> "LmHeadGradients":
        """Allocates the gradients: 0 for the bias, uninitialised for weight and hidden states."""
        dweight = None if weight is None else torch.empty_like(weight, dtype=accum_dtype)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=accum_dtype)
        return cls(torch.empty_like(hidden, dtype=accum_dtype), dweight, dbias)

    def zero_weight_(self, first_row: int = 0) -> None:
        """Sets the gradient of the weight to 0, from a row on."""
        if self.weight is not None:
            self.weight[first_row:].zero_()
