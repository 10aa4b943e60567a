"""The loss's work on logits, by torch operations: one buffer [chunk, V] per temperature of the student.

    logits [n, V] of temperature 1, and logits / τ into the buffer of each other τ
    the softmax over the tail in each buffer's place
    τ dL/dlogits in each buffer's place, and their sum dL/dlogits into the first

What is left to the kind of device are three matmuls:

    forward      logits [n, V] = hidden [n, D] @ weight.T
    backward     dhidden [n, D] = dlogits [n, V] @ weight [V, D]
                 dweight [V, D] += dlogits.T @ hidden
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from kd_core.losses import calibration
from kd_core.losses.fused.backend import LogitGradients, LossBackend
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.vocab_shard import ShardColumns, VocabStats, empty_stats

# Rows that are copied at a time where a pass over the vocabulary needs a second copy of them.
BLOCK_ROWS = 32


class TorchBackend(LossBackend):
    """Everything but the matmuls."""

    def __init__(self, head: LmHead, chunk_tokens: int, temperatures: Sequence[float]) -> None:
        super().__init__(head, chunk_tokens, temperatures)
        shape, dtype = (chunk_tokens, len(head.weight)), head.precision.accum_dtype
        self._buffers = {temperature: head.weight.new_empty(shape, dtype=dtype) for temperature in temperatures}
        # The chunk's views of these buffers, and the derivative of the soft cap [n, V] or None without a soft cap.
        self._chunk: dict[float, Tensor] = {}
        self._slope: Tensor | None = None

    @abstractmethod
    def _multiply_(self, hidden: Tensor, out: Tensor) -> None:
        """Writes hidden @ weight.T to `out` [n, V]."""

    @abstractmethod
    def _add_products_(self, gradients: LmHeadGradients, positions: slice, hidden: Tensor, dproduct: Tensor) -> None:
        """Adds to the gradients by hidden states and weight.

        Args:
            gradients: those of all chunks.
            positions: those of the chunk.
            hidden: their hidden states [n, D].
            dproduct: the gradient [n, V] by hidden @ weight.T. It may be overwritten.
        """

    def logits_(self, hidden: Tensor) -> None:
        """Computes the logits of a chunk, and for every other temperature logits / τ."""
        self._chunk = {temperature: buffer[: len(hidden)] for temperature, buffer in self._buffers.items()}
        logits = self._chunk[1.0]
        self._multiply_(hidden, logits)
        self._slope = self.head.to_logits_(logits, self.head.bias)
        for temperature, buffer in self._chunk.items():
            if temperature != 1:
                torch.div(logits, temperature, out=buffer)

    def tail_statistics_(
        self, entries: ShardColumns, labels: ShardColumns, sum_temperatures: Collection[float]
    ) -> dict[float, VocabStats]:
        """Overwrites the logits of each temperature with the softmax over this shard's tail."""
        if self.head.shard.padding:
            # The one row is no real token. Neutral statistics take part in the sums over shards.
            K = entries.columns.shape[1]
            return {temperature: empty_stats(logits.zero_(), K) for temperature, logits in self._chunk.items()}
        return {
            temperature: _tail_statistics_(logits, entries, labels, temperature in sum_temperatures)
            for temperature, logits in self._chunk.items()
        }

    def tail_entropy(self) -> Tensor:
        """Computes the entropy in blocks of rows, since `entr` copies them."""
        return torch.cat([torch.special.entr(rows).sum(dim=1) for rows in self._chunk[1.0].split(BLOCK_ROWS)])

    def tail_power_sums(self) -> Tensor:
        """Computes the power sums of the softmax in the first buffer."""
        return calibration.power_sums(self._chunk[1.0])

    def add_gradients_(
        self,
        gradients: LmHeadGradients,
        positions: slice,
        hidden: Tensor,
        by_temperature: Mapping[float, LogitGradients],
    ) -> None:
        """Writes dL/dlogits over the softmaxes, takes it through the head's form, and multiplies."""
        dlogits = self._chunk[1.0]
        for temperature, logit_gradients in by_temperature.items():
            _write_dlogits_(self._chunk[temperature], logit_gradients)
            if temperature != 1:
                dlogits.add_(self._chunk[temperature], alpha=1 / temperature)
        if self.head.shard.padding:
            dlogits.zero_()
        # Through the soft cap: the gradient by scale · hidden @ weight.T + bias.  [n, V]
        if self._slope is not None:
            dlogits.mul_(self._slope)
        # dbias = Σ over positions of dlogits.  [V]
        if gradients.bias is not None:
            gradients.bias[: len(self.head.weight)] += dlogits.sum(dim=0)
        if self.head.scale != 1:
            dlogits.mul_(self.head.scale)
        self._add_products_(gradients, positions, hidden, dlogits)


def _mark_support_(logits: Tensor, entries: ShardColumns) -> tuple[Tensor, Tensor, Tensor]:
    """Finds one distinct entry per id. Overwrites the logits [n, V] at the entries' columns.

    Returns:
        Columns [n, K] that `scatter_` may write for every entry, the mask of distinct entries [n, K], and the mask of
        rows [n, 1] that have an entry in this shard.
    """
    in_shard = entries.in_shard
    row_has_entry = in_shard.any(dim=1, keepdim=True)
    # Redirect entries that are unused, or of another shard, to the row's first entry in this shard. Of a row without
    # any they all go to the column of entry 0, which is no support here: the caller restores its logit.  [n, K]
    own_index = torch.arange(in_shard.shape[1], device=logits.device)
    indices = torch.where(in_shard, own_index, in_shard.int().argmax(dim=1, keepdim=True))
    columns = entries.columns.gather(1, indices)
    # Mark one entry per distinct id: every entry scatters its index, the last writer reads it back.  [n, K]
    marks = indices.to(logits.dtype)
    logits.scatter_(1, columns, marks)
    return columns, in_shard & (logits.gather(1, columns) == marks), row_has_entry


def _tail_statistics_(logits: Tensor, entries: ShardColumns, labels: ShardColumns, needs_tail_sum: bool) -> VocabStats:
    """Computes one shard's statistics of logits / τ [n, V] and overwrites the logits with the softmax over its tail.

    A row without a tail gets some finite numbers in place of that softmax.
    """
    # Logits of the entries and of the label, before they are overwritten.  [n, K] and [n]
    gathered = logits.gather(1, entries.columns)
    label_logit = logits.gather(1, labels.columns).squeeze(1)
    columns, distinct, row_has_entry = _mark_support_(logits, entries)
    # Rows without an entry in this shard had the logit of entry 0's column overwritten, which is part of the tail.
    restored = gathered[:, :1]
    tail_size = logits.shape[1] - distinct.sum(dim=1)
    tail_exists = tail_size > 0
    # Sum of the tail's logits: the support counts 0.  [n]
    tail_sum = torch.zeros_like(label_logit)
    if needs_tail_sum:
        logits.scatter_(1, columns, torch.where(row_has_entry, 0.0, restored).expand_as(columns))
        tail_sum = logits.sum(dim=1)
    # Softmax over the tail, in place: the support's logits are −inf. Its largest value is e^(max − logsumexp), so
    # logsumexp = max − log of that value, without a second pass of exponentials. A row that is all support would be
    # the softmax of nothing but −inf, NaN, so its logits are 0.  [n, V] and [n]
    filler = torch.where(tail_exists, -torch.inf, 0.0)[:, None]
    logits.scatter_(1, columns, torch.where(row_has_entry, filler, restored).expand_as(columns))
    tail_max = torch.where(tail_exists, logits.amax(dim=1), -torch.inf)
    tail_logsumexp = tail_max - torch.softmax(logits, dim=1, out=logits).amax(dim=1).log()
    # Entries and labels of other shards count 0, so that shards add up.  [n, K] and [n]
    return VocabStats(
        torch.where(entries.in_shard, gathered, 0.0),
        distinct,
        torch.where(labels.in_shard.squeeze(1), label_logit, 0.0),
        tail_sum,
        tail_size,
        tail_max,
        tail_logsumexp,
    )


def _write_dlogits_(tail_softmax: Tensor, gradients: LogitGradients) -> None:
    """Overwrites the tail's softmax [n, V] with τ dL/dlogits."""
    tail_softmax.mul_(gradients.tail_factor[:, None])
    if gradients.tail_offset is not None:
        tail_softmax.add_(gradients.tail_offset[:, None])
    # Add the support and the label last: their differences were made on [n, K], in float32 at least.
    (columns, in_shard), (label_column, has_label) = gradients.entry_columns, gradients.label_columns
    tail_softmax.scatter_add_(1, columns, torch.where(in_shard, gradients.entries, 0.0))
    tail_softmax.scatter_add_(1, label_column, torch.where(has_label, gradients.label[:, None], 0.0))
