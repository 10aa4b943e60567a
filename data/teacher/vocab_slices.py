"""Exchange between ranks that each hold a slice of the vocabulary, for the selection of `select.py`.

Rank r of a tensor-parallel group has logits [n, V_r] of the token ids `first` to `first` + V_r − 1. Slices follow each
other in the order of ids. The ranks of a group select from the same positions together:

    candidates   [n, 2 (K + 1) + 1]   each rank's K + 1 largest logits with their ids, and the label's logit
    sums         [n, 1 + τs]          log-sums of each rank's tail, at τ = 1 and at further temperatures
    masses       [n]                  each rank's share of the tail, if samples are drawn
    samples      [n, S]               the ids that were drawn, each by the rank whose slice holds it

No rank ever has logits [n, V]. Afterwards all ranks have the same scores, because they merge the same numbers.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kd_core.parallel.world import World


class Candidates(NamedTuple):
    """The K entries of n positions, the label's logit, and the largest logit of this rank's tail with its column."""

    logits: Float[Tensor, "n K"]
    ids: Int[Tensor, "n K"]
    label: Float[Tensor, " n"]
    tail_largest: Float[Tensor, " n"]
    tail_column: Int[Tensor, " n"]


class WholeVocab:
    """The one slice of a process that holds the whole vocabulary. Nothing is exchanged."""

    is_whole = True
    first = 0

    def merge(
        self, logits: Float[Tensor, "n V"], largest: tuple[Tensor, Tensor], labels: Int[Tensor, " n"], top_k: int
    ) -> Candidates:
        """Returns the candidates of all slices together, from the K + 1 `largest` logits of this one and their columns.

        A slice of fewer columns gives all of them.
        """
        del top_k
        values, ids = largest
        label = logits.gather(1, labels[:, None]).squeeze(1)
        return Candidates(values[:, :-1].contiguous(), ids[:, :-1].contiguous(), label, values[:, -1], ids[:, -1])

    def remove_(self, logits: Float[Tensor, "n V"], candidates: Candidates) -> None:
        """Sets the logits of the entries to −inf, which takes them out of all sums of the tail."""
        logits.scatter_(1, candidates.ids, -torch.inf)

    def put_back_(self, tail: Float[Tensor, "n V"], ids: Int[Tensor, "n K"], values: Float[Tensor, "n K"]) -> None:
        """Sets the probabilities of these ids, which are 0 in `tail`."""
        tail.scatter_(1, ids, values)

    def log_sums(self, sums: list[Tensor]) -> list[Tensor]:
        """Returns log Σ e^sum over all slices, of each of the sums [n]."""
        return sums

    def cumulate(self, mass: Float[Tensor, " n"], uniforms: Float[Tensor, "n S"]) -> tuple[Tensor, Tensor, Tensor]:
        """Places draws among the slices.

        Returns:
            target: each draw's mass behind the start of this slice.  [n, S]
            is_here: which draws fall into this slice.  [n, S]
            total: the mass of all slices.  [n]
        """
        return uniforms * mass[:, None], torch.ones_like(uniforms, dtype=torch.bool), mass

    def global_ids(self, columns: Int[Tensor, "n S"], is_here: Tensor) -> Int[Tensor, "n S"]:
        """Returns the ids of drawn columns, on every rank."""
        del is_here
        return columns

    def gather(self, tail: Float[Tensor, "n V"], ids: Int[Tensor, "n S"]) -> Float[Tensor, "n S"]:
        """Returns the values of these ids, on every rank."""
        return tail.gather(1, ids)


class VocabSlice(WholeVocab):
    """One of several slices, of the ranks of `group` in the order of their ids."""

    is_whole = False

    def __init__(self, first: int, group: dist.ProcessGroup) -> None:
        self.first, self.group = first, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def _all_gather(self, values: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values.contiguous(), group=self.group)
        return gathered

    def _locate(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the columns of ids, and a mask of those in this slice. All others get some valid column."""
        columns = ids - self.first
        return columns.clamp(0, logits.shape[1] - 1), (columns >= 0) & (columns < logits.shape[1])

    def merge(self, logits: Tensor, largest: tuple[Tensor, Tensor], labels: Tensor, top_k: int) -> Candidates:
        # A slice may have less than k = K + 1 columns. The rest of its candidates are −inf.  [n, k]
        k, short = top_k + 1, top_k + 1 - largest[0].shape[1]
        values, ids = F.pad(largest[0], (0, short), value=-torch.inf), F.pad(largest[1], (0, short))
        column, is_here = self._locate(logits, labels[:, None])
        label = torch.where(is_here, logits.gather(1, column), -torch.inf)
        # One exchange of 32-bit words: logits, ids and label.  [n, 2k + 1] of each slice
        words = torch.cat([values.view(torch.int32), (ids + self.first).int(), label.view(torch.int32)], dim=1)
        slices = self._all_gather(words)
        all_values = torch.cat([words[:, :k] for words in slices], dim=1).view(torch.float32)  # [n, slices · k]
        all_ids = torch.cat([words[:, k:-1] for words in slices], dim=1)
        label = torch.stack([words[:, -1] for words in slices], dim=1).view(torch.float32).amax(dim=1)
        # The K largest of all slices are the entries. They are in falling order.  [n, K]
        entries, places = all_values.topk(top_k, dim=1)
        entry_ids = all_ids.gather(1, places).long()
        # The first of this slice's k candidates that is no entry is the largest logit of its tail.  [n, k]
        is_entry = torch.zeros_like(all_ids, dtype=torch.bool).scatter_(1, places, value=True)
        own_columns = slice(self.rank * k, (self.rank + 1) * k)
        place = is_entry[:, own_columns].to(torch.uint8).argmin(dim=1, keepdim=True)
        # A slice without a tail gets one column of vanishing mass, for a softmax of −inf alone is undefined.
        tail_largest = values.gather(1, place).clamp(min=torch.finfo(torch.float32).min)
        return Candidates(entries, entry_ids, label, tail_largest.squeeze(1), ids.gather(1, place).squeeze(1))

    def remove_(self, logits: Tensor, candidates: Candidates) -> None:
        # The smaller of two numbers: +inf leaves the columns that stand for ids of other slices as they are.
        columns, is_here = self._locate(logits, candidates.ids)
        logits.scatter_reduce_(1, columns, torch.where(is_here, -torch.inf, torch.inf), "amin")
        # Only where the slice has no tail does this change its column.
        logits.scatter_(1, candidates.tail_column[:, None], candidates.tail_largest[:, None])

    def put_back_(self, tail: Tensor, ids: Tensor, values: Tensor) -> None:
        columns, is_here = self._locate(tail, ids)
        tail.scatter_add_(1, columns, torch.where(is_here, values, 0.0))

    def log_sums(self, sums: list[Tensor]) -> list[Tensor]:
        return list(torch.stack(self._all_gather(torch.stack(sums))).logsumexp(dim=0))

    def cumulate(self, mass: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Cumulate the masses in the order of ids, so that a draw falls on the id it would fall on in one slice.
        ends = torch.stack(self._all_gather(mass), dim=1).cumsum(dim=1)  # [n, slices]
        target = uniforms * ends[:, -1:]
        # Every draw belongs to the first slice that ends behind it. All ranks compute the same.  [n, S]
        is_here = torch.searchsorted(ends, target, right=True).clamp(max=self.size - 1) == self.rank
        behind_start = target - (ends[:, self.rank - 1 : self.rank] if self.rank else 0.0)
        # Rounding may point behind the slice's end.
        return behind_start.minimum(mass.nextafter(torch.zeros_like(mass))[:, None]), is_here, ends[:, -1]

    def global_ids(self, columns: Tensor, is_here: Tensor) -> Tensor:
        ids = torch.where(is_here, columns + self.first, 0)
        dist.all_reduce(ids, group=self.group)
        return ids

    def gather(self, tail: Tensor, ids: Tensor) -> Tensor:
        columns, is_here = self._locate(tail, ids)
        values = torch.where(is_here, tail.gather(1, columns), 0.0)
        dist.all_reduce(values, group=self.group)
        return values


WHOLE_VOCAB = WholeVocab()


def vocab_slice(world: World, lm_head_rows: int) -> WholeVocab:
    """Returns this rank's slice of an lm_head whose rows are divided over tensor-parallel ranks."""
    if world.mesh is None or world.layout.tensor == 1:
        return WHOLE_VOCAB
    return VocabSlice(world.tp_rank * math.ceil(lm_head_rows / world.layout.tensor), world.mesh["tp"].get_group())
