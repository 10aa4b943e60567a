"""Where the documents of packed rows lie, as attention needs it: on the host for a loop, on the device for a kernel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor

SHORTEST_BOUND = 128  # positions of the kernel's largest tile, below which a tighter bound saves nothing


def _power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Documents:
    """The documents of B packed rows, end to end. What pads a row is a document too.

    Compiled and captured graphs depend on shapes and on Python numbers. So `cu_seqlens` and `longest` are rounded up
    to powers of two, and graphs take few of their values. `lengths` stays outside of graphs.

    Args:
        lengths: positions of each document, in order. They add up to N = B·T.
        cu_seqlens: where each document begins in N, then N, repeated: empty documents that round their number up.
        longest: an upper bound of the lengths.
        whole_rows: each row is one document.
        keys: the same documents with the positions of their keys, where those are more than the queries'. Their last
            positions are those of the queries.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Int[Tensor, " S+1"]
    longest: int
    whole_rows: bool
    keys: "Documents | None" = None

    @classmethod
    def from_ids(cls, document_ids: Int[Tensor, "B T"]) -> Self:
        """Returns the runs of equal document id. Waits for a device that the ids are on, so `Collate` calls it."""
        ids = document_ids.cpu()
        # A document starts at position 0 of every row, and wherever the id differs from the one before.  [B, T] bool
        starts = torch.ones(ids.shape, dtype=torch.bool)
        torch.ne(ids[:, 1:], ids[:, :-1], out=starts[:, 1:])
        # Each ends where the next one starts, the last one at N = B·T.
        begins: list[int] = starts.flatten().nonzero().flatten().tolist()
        lengths = [end - begin for begin, end in zip(begins, [*begins[1:], ids.numel()], strict=True)]
        return cls.from_lengths(lengths, len(ids)).to(document_ids.device)

    @classmethod
    def one_a_row(cls, like: Int[Tensor, "B T"]) -> Self:
        """Returns a document for each row, on the device of `like`, whose values do not matter."""
        return cls.from_lengths([like.shape[1]] * len(like), len(like)).to(like.device)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], rows: int) -> Self:
        """Returns documents of these lengths, in so many rows of equal length."""
        empty = [0] * (_power_of_two(len(lengths)) - len(lengths))
        cu_seqlens = torch.tensor([0, *accumulate([*lengths, *empty])], dtype=torch.int32)
        longest = min(sum(lengths) // rows, max(SHORTEST_BOUND, _power_of_two(max(lengths))))
        return cls(tuple(lengths), cu_seqlens, longest, whole_rows=len(lengths) == rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Applies a function to every tensor."""
        keys = None if self.keys is None else self.keys.map(function)
        return replace(self, cu_seqlens=function(self.cu_seqlens), keys=keys)

    def to(self, device: torch.device) -> Self:
        """Returns the same documents with `cu_seqlens` on another device."""
        return self.map(lambda tensor: tensor.to(device))
