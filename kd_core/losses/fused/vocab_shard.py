"""The vocab shard of this process: the whole vocabulary, or the slice that one rank of a tensor-parallel group holds.

Each rank computes logits of its own rows of the lm_head alone. For a chunk of n positions the forward pass needs two
all-reduces:

    max   [n]            the largest logit of the tail
    sum   [n, 2K + 4]    logits of the K entries, which of them are distinct, and four numbers per position

The backward pass needs none: after the forward pass every rank has all that the gradient of its own columns takes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor


class ShardColumns(NamedTuple):
    """Columns of token ids in the shard's logits.

    `in_shard` is true where the id is used and belongs to this shard. All other ids get some valid column, so that
    gathers need no mask.
    """

    columns: Int[Tensor, "n k"]
    in_shard: Bool[Tensor, "n k"]


class VocabStats(NamedTuple):
    """Statistics of logits [n, V] that determine a view, of one shard or of all shards together.

    Of one shard, logits of entries and labels that belong to other shards are 0, so that shards add up.
    """

    entry_logits: Float[Tensor, "n K"]
    distinct: Bool[Tensor, "n K"]
    """One used entry for each id of the support."""
    label_logit: Float[Tensor, " n"]
    tail_sum: Float[Tensor, " n"]
    """Sum of the tail's logits, where a term asks for it."""
    tail_size: Int[Tensor, " n"]
    tail_max: Float[Tensor, " n"]
    """The tail's largest logit; −inf where there is none."""
    tail_logsumexp: Float[Tensor, " n"]
    """logsumexp of the tail's logits; −inf where there are none."""


@dataclass(frozen=True)
class VocabShard:
    """A slice of the lm_head's rows, from row `first` on.

    Args:
        first: the token id of the first row.
        group: the ranks that hold all rows together. None means that this process holds the whole vocabulary.
        padding: true if no row is a real token. One row stands for them, and its logits are never read.
    """

    first: int = 0
    group: dist.ProcessGroup | None = None
    padding: bool = False

    def rows(self, weight_rows: int, vocab_size: int) -> int:
        """Returns how many of the shard's rows are real tokens, the others being padding behind the vocabulary."""
        return min(weight_rows, max(0, vocab_size - self.first))

    def locate(self, ids: Int[Tensor, "n k"], used: Bool[Tensor, "n k"], rows: int) -> ShardColumns:
        """Returns the columns of ids in logits of the shard's `rows` rows."""
        if self.group is None:
            return ShardColumns(ids, used)
        # Column of each id, clamped into the shard for ids of other ranks.  [n, k]
        columns = ids - self.first
        in_shard = used & (columns >= 0) & (columns < rows)
        return ShardColumns(columns.clamp(0, rows - 1), in_shard)

    def all_reduce_sum_(self, values: Tensor) -> Tensor:
        """Adds up the values of all shards, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def all_reduce(self, stats: VocabStats) -> tuple[VocabStats, Tensor | None]:
        """Combines the statistics of all shards, with the same result on every rank.

        Returns:
            The statistics of the whole vocabulary, and this shard's share of the tail's mass [n]. The share is None
            where the shard is the whole vocabulary.
        """
        if self.group is None:
            return stats, None
        # Largest logit of the tail over all shards.  [n]
        tail_max = stats.tail_max.clone()
        dist.all_reduce(tail_max, dist.ReduceOp.MAX, group=self.group)
        # This shard's Σ e^(z − max) over the tail: at most its size, so no shard overflows. Max −inf is an empty tail.
        base = torch.where(tail_max > -torch.inf, tail_max, 0.0)
        mass = (stats.tail_logsumexp - base).exp()
        # Add up everything else in one message. Entries and labels are 0 on all ranks but the one that holds them.
        dtype, K = stats.entry_logits.dtype, stats.entry_logits.shape[1]
        singles = torch.stack([stats.label_logit, stats.tail_sum, stats.tail_size.to(dtype), mass], dim=1)
        total = self.all_reduce_sum_(torch.cat([stats.entry_logits, stats.distinct.to(dtype), singles], dim=1))
        entry_logits, distinct, singles = total.split([K, K, 4], dim=1)
        label_logit, tail_sum, tail_size, total_mass = singles.unbind(dim=1)
        # logsumexp of the whole tail = max + log Σ over shards of e^(z − max).  [n]
        whole = VocabStats(
            entry_logits, distinct > 0, label_logit, tail_sum, tail_size.long(), tail_max, base + total_mass.log()
        )
        return whole, torch.where(mass > 0, mass / total_mass, 0.0)


def empty_stats(logits: Float[Tensor, "n V"], entries: int) -> VocabStats:
    """Returns the statistics of a shard without a real token: the neutral elements of both reductions."""
    zeros = logits.new_zeros(len(logits))
    entry_logits = logits.new_zeros(len(logits), entries)
    return VocabStats(entry_logits, entry_logits > 0, zeros, zeros, zeros.long(), zeros - torch.inf, zeros - torch.inf)


WHOLE_VOCAB = VocabShard()
