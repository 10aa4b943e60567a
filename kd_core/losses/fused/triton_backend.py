"""The loss's work on logits, by Triton kernels: one buffer [chunk, V] for all temperatures of the student.

the product hidden @ weight.T [n, V]                       one matmul
support and label taken out of it                          a kernel over [n, K]
statistics of the tail at all temperatures                 a kernel, one read of [n, V]
the gradient by the product, rounded, in its own memory    a kernel, one read and half a write of [n, V]
gradients by hidden states and weight                      two matmuls
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_core.kernels import logit_operators as kernels
from kd_core.losses import calibration
from kd_core.losses.fused.backend import LogitGradients, LossBackend
from kd_core.losses.fused.cuda_backend import GATHERED_ROWS, CudaMatmuls, support_is_cheaper
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.vocab_shard import ShardColumns, VocabStats, empty_stats

# Rows of the buffer begin at multiples of so many numbers, as fast matmuls want them whatever the vocabulary.
ALIGNED = 16


class TritonBackend(LossBackend):
    """Kernels between the matmuls of a GPU."""

    gathered_rows = GATHERED_ROWS
    support_is_cheaper = staticmethod(support_is_cheaper)

    def __init__(self, head: LmHead, chunk_tokens: int, temperatures: Sequence[float]) -> None:
        super().__init__(head, chunk_tokens, temperatures)
        self._matmuls = CudaMatmuls(head)
        V, dtype = len(head.weight), head.precision.accum_dtype
        self._buffer = head.weight.new_empty((chunk_tokens, -(-V // ALIGNED) * ALIGNED), dtype=dtype)[:, :V]
        # Filled on the device: a copy from the host would wait for it.
        self._inverse = torch.stack([self._buffer.new_full((), 1 / temperature) for temperature in temperatures])
        scale, cap = (self._buffer.new_full((), number) for number in (head.scale, head.soft_cap or 0.0))
        self._form: dict[str, Any] = {
            "form": torch.stack([scale, cap]), "bias": head.bias, "capped": head.soft_cap is not None
        }  # fmt: skip

    @staticmethod
    def scale_(values: Tensor, factor: Tensor) -> None:
        """Looks at the factor on the device."""
        kernels.scale_unless_one(values, factor)

    def logits_(self, hidden: Tensor) -> None:
        """Computes the products alone. The kernels make logits of them where they read them."""
        self._product = self._buffer[: len(hidden)]
        self._matmuls.multiply_(hidden, self._product)

    def tail_statistics_(
        self, entries: ShardColumns, labels: ShardColumns, sum_temperatures: Collection[float]
    ) -> dict[float, VocabStats]:
        """Overwrites the products of the support."""
        K = entries.columns.shape[1]
        if self.head.shard.padding:
            return dict.fromkeys(self.temperatures, empty_stats(self._product.zero_(), K))
        # The entries' columns, and the label's behind them.  [n, K + 1]
        self._columns, in_shard = (torch.cat(pair, dim=1) for pair in zip(entries, labels, strict=True))
        self._logits, self._slots = kernels.mark_support(self._product, self._columns, in_shard, **self._form)
        self._top, self._mass, tail_sum, _ = kernels.reduce_tail(
            self._product, self._inverse, **self._form, with_sum=bool(sum_temperatures), with_spread=False
        )
        tail_sum = tail_sum if sum_temperatures else torch.zeros_like(tail_sum)
        # Each id's slot is the number of its distinct entry.  [n, K] and [n]
        distinct = self._slots[:, :K] == torch.arange(K, device=self._slots.device)
        tail_size = self._product.shape[1] - distinct.sum(dim=1)
        log_mass = self._mass.log()

        def stats(temperature: float, index: int) -> VocabStats:
            logits, top, total = (
                values if temperature == 1 else values / temperature for values in (self._logits, self._top, tail_sum)
            )
            return VocabStats(logits[:, :K], distinct, logits[:, K], total, tail_size, top, top + log_mass[index])

        return {temperature: stats(temperature, index) for index, temperature in enumerate(self.temperatures)}

    def tail_entropy(self) -> Tensor:
        """Computes log M + Σ (m − z) e^(z − m) / M, with the largest logit m and M = Σ e^(z − m), in one more read."""
        _, mass, _, spread = kernels.reduce_tail(
            self._product, self._inverse[:1], **self._form, with_sum=False, with_spread=True
        )
        return mass[0].log() + spread / mass[0]

    def tail_power_sums(self) -> Tensor:
        """Computes Σ s^(1/τ) as Σ e^((z − m) / τ) / M^(1/τ) at all temperatures in one more read."""
        first, *_, last = calibration.EIGHTHS
        inverse = torch.arange(first, last + 1, dtype=self._product.dtype, device=self._product.device) / 8
        _, mass, _, _ = kernels.reduce_tail(self._product, inverse, **self._form, with_sum=False, with_spread=False)
        # M is the mass at 1/τ = 1.  [n, temperatures]
        at_one = mass[calibration.EIGHTHS.index(8)]
        return (mass / at_one ** inverse[:, None]).t()

    def begin_gradients_(self, gradients: LmHeadGradients) -> None:
        """Leaves rows as they are that the first chunk overwrites."""
        self._matmuls.begin_gradients_(gradients, self.chunk_tokens)

    def add_gradients_(
        self,
        gradients: LmHeadGradients,
        positions: slice,
        hidden: Tensor,
        by_temperature: Mapping[float, LogitGradients],
    ) -> None:
        """Writes the gradient over the products, in the dtype of the matmuls that take it."""
        dproduct = self._product.view(self._matmuls.dtype)[:, : self._product.shape[1]]
        if self.head.shard.padding:
            dproduct.zero_()
        else:
            self._write_dproduct_(by_temperature)
        # dbias = Σ over positions of dlogits, which the kernel multiplied by the scale.  [V]
        if gradients.bias is not None:
            dbias = dproduct.sum(dim=0, dtype=gradients.bias.dtype)
            gradients.bias[: len(dbias)].add_(dbias, alpha=1 / self.head.scale)
        self._matmuls.add_products_(gradients, positions, hidden, dproduct)

    def _write_dproduct_(self, by_temperature: Mapping[float, LogitGradients]) -> None:
        def summed(values: list[Tensor]) -> Tensor:
            """Adds up dL/dlogits over temperatures, from τ dL/dlogits of each."""
            scaled = [value if t == 1 else value / t for t, value in zip(self.temperatures, values, strict=True)]
            return scaled[0] if len(scaled) == 1 else torch.stack(scaled).sum(dim=0)

        every = [by_temperature[temperature] for temperature in self.temperatures]
        offsets = [torch.zeros_like(g.label) if g.tail_offset is None else g.tail_offset for g in every]
        # Equal ids share a slot, where their gradients add up.  [n, K + 1] → [n, K + 2] → [n, K + 1]
        values = torch.cat([summed([g.entries for g in every]), summed([g.label for g in every])[:, None]], dim=1)
        slots = values.new_zeros(len(values), values.shape[1] + 1).scatter_add_(1, self._slots, values)
        # factor / (τ M) for each temperature.  [T, n]
        factors = torch.stack([g.tail_factor for g in every]) * self._inverse[:, None] / self._mass
        kernels.write_dlogits(
            self._product, self._inverse, **self._form, top=self._top, factors=factors, offset=summed(offsets),
            columns=self._columns, slots=self._slots, logits=self._logits, values=slots.gather(1, self._slots),
            dtype=self._matmuls.dtype,
        )  # fmt: skip
