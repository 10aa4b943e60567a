"""The part of the vocabulary that this process holds: all of it, or the rows of one rank of a tensor-parallel group.

Each rank sees the logits of its own rows alone. What the loss needs of the others are a few numbers a position and
the logits of the K entries, so a chunk of n positions costs one reduction of [n] (the largest logits) and one of
[n, 2K + 4], forward; nothing in the backward pass, since every rank then has all that its own columns need.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Located(NamedTuple):
    """Columns that exist here for every id, and which of the ids are this part's own."""

    columns: Int[Tensor, "n k"]
    own: Bool[Tensor, "n k"]


class Found(NamedTuple):
    """What a part, or all parts together, know of n positions. Where an id is another part's, its logit is 0 here."""

    logits: Float[Tensor, "n K"]
    """Of the entries."""
    distinct: Bool[Tensor, "n K"]
    """One used entry for each id of the support."""
    label: Float[Tensor, " n"]
    tail_sum: Float[Tensor, " n"]
    """Sum of the tail's logits, where a term asks for it."""
    tail_size: Int[Tensor, " n"]
    largest: Float[Tensor, " n"]
    """The tail's largest logit; −inf where there is none."""
    tail: Float[Tensor, " n"]
    """logsumexp of the tail's logits; −inf where there are none."""


@dataclass(frozen=True)
class Part:
    """Rows of the head from `first` on, of those that `group`'s ranks hold together; without a group, all of them.

    `padding`: none of them is a real token. One row stands for them, with logits that nothing reads.
    """

    first: int = 0
    group: dist.ProcessGroup | None = None
    padding: bool = False

    def rows(self, held: int, vocab: int) -> int:
        """How many of the `held` rows are real tokens of a vocabulary."""
        return min(held, max(0, vocab - self.first))

    def locate(self, ids: Int[Tensor, "n k"], used: Bool[Tensor, "n k"], rows: int) -> Located:
        """Where ids are among `rows` rows."""
        if self.group is None:
            return Located(ids, used)
        columns = ids - self.first
        own = used & (columns >= 0) & (columns < rows)
        return Located(columns.clamp(0, rows - 1), own)

    def sum_(self, values: Tensor) -> Tensor:
        """Add up all parts' values, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def together(self, here: Found) -> tuple[Found, Tensor | None]:
        """What all parts know, the same on every rank; and exp(this part's tail − the whole tail), None where alone."""
        if self.group is None:
            return here, None
        largest = here.largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        base = torch.where(largest > -torch.inf, largest, 0.0)
        mass = (here.tail - base).exp()
        dtype, K = here.logits.dtype, here.logits.shape[1]
        singles = torch.stack([here.label, here.tail_sum, here.tail_size.to(dtype), mass], dim=1)
        total = self.sum_(torch.cat([here.logits, here.distinct.to(dtype), singles], dim=1))
        logits, distinct, singles = total.split([K, K, 4], dim=1)
        label, tail_sum, size, mass_of_all = singles.unbind(dim=1)
        found = Found(logits, distinct > 0, label, tail_sum, size.long(), largest, base + mass_of_all.log())
        return found, torch.where(mass > 0, mass / mass_of_all, 0.0)


def nothing_found(like: Float[Tensor, "n V"], entries: int) -> Found:
    """Returns what a part without a real token adds to the others."""
    zeros = like.new_zeros(len(like))
    logits = like.new_zeros(len(like), entries)
    return Found(logits, logits > 0, zeros, zeros, zeros.long(), zeros - torch.inf, zeros - torch.inf)


WHOLE = Part()
