"""Windows: runs of a document's tokens that fit a row. Every label of a document is scored in exactly one of them.

A window of `row_length` positions starts every `row_length − overlap` positions. The first `overlap` positions of a
later window were scored in the one before: here they are context alone.

    document   t0 t1 t2 t3 t4 t5 t6 t7 t8        8 positions, labels t1 … t8
    window 0   t0 t1 t2 t3 t4                    row_length 4, overlap 2: scores t1 … t4
    window 2         t2 t3 t4 t5 t6                                       scores       t5 t6
    window 4               t4 t5 t6 t7 t8                                 scores             t7 t8
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.corpus.encoding import Encoded

Array = np.ndarray[Any, np.dtype[Any]]


class Window(NamedTuple):
    """A run of a document's tokens: T inputs and one more, the last label; and which of the T labels are scored."""

    document: str
    start: int
    token_ids: Array
    loss_mask: Array

    @property
    def positions(self) -> int:
        """T."""
        return len(self.loss_mask)


def windows_of(documents: Iterable[Encoded], row_length: int, overlap: int = 0) -> Iterator[Window]:
    """The windows of each document in order, without those that score nothing; neighbours share a token at least."""
    for document in documents:
        positions = len(document.loss_mask)
        for start in range(0, positions, row_length - overlap):
            end = min(start + row_length, positions)
            mask = document.loss_mask[start:end]
            if start and overlap:
                mask = np.concatenate([np.zeros(overlap, mask.dtype), mask[overlap:]])
            if mask.any():  # a last window may be all head
                yield Window(document.name, start, document.token_ids[start : end + 1], mask)


def choose_windows(windows: Sequence[Window], tokens: int | None, seed: int) -> list[Window]:
    """Windows drawn without replacement while they fit into `tokens` positions (None: all), in corpus order."""
    if tokens is None:
        return list(windows)
    chosen: list[int] = []
    left = tokens
    for index in np.random.default_rng(seed).permutation(len(windows)).tolist():
        size = windows[index].positions
        if size <= left:
            chosen.append(index)
            left -= size
        if left <= 0:
            break
    return [windows[index] for index in sorted(chosen)]
