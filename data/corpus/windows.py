"""Windows: runs of a document's tokens that fit a packed row. Each label of a document is scored in exactly one.

A window of `row_length` positions starts every `row_length − overlap` positions. The first `overlap` positions of a
later window were scored in the window before it, so they are only context.

    document   t0 t1 t2 t3 t4 t5 t6 t7 t8        8 positions, labels t1 … t8
    window 0   t0 t1 t2 t3 t4                    row_length 4, overlap 2: scores t1 … t4
    window 2         t2 t3 t4 t5 t6                                       scores       t5 t6
    window 4               t4 t5 t6 t7 t8                                 scores             t7 t8
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.cache.contents import prompted_name
from data.corpus.encoding import Encoded

Array = np.ndarray[Any, np.dtype[Any]]


class Window(NamedTuple):
    """A run of T + 1 tokens of a document: T inputs, and the last label. `loss_mask` marks the scored labels [T].

    `context` has the tokens that the teacher reads in place of those before the first scored label, if there are such.
    """

    document: str
    start: int
    token_ids: Array
    loss_mask: Array
    context: Array | None = None

    @property
    def positions(self) -> int:
        return len(self.loss_mask)


def cut_windows(documents: Iterable[Encoded], row_length: int, overlap: int = 0) -> Iterator[Window]:
    """Yields the windows of each document in order, leaving out those that score nothing.

    Neighbours share at least one token: the last label of a window is the first input of the next.
    """
    for document in documents:
        name, positions = prompted_name(document.name, document.context), len(document.loss_mask)
        for start in range(0, positions, row_length - overlap):
            end = min(start + row_length, positions)
            mask = document.loss_mask[start:end]
            if start and overlap:
                mask = np.concatenate([np.zeros(overlap, mask.dtype), mask[overlap:]])
            if mask.any():  # a last window may hold nothing beyond its overlap
                yield Window(name, start, document.token_ids[start : end + 1], mask, document.context)


def choose_windows(windows: Sequence[Window], tokens: int | None, seed: int) -> list[Window]:
    """Draws windows without replacement while they fit into `tokens` positions. Returns them in corpus order.

    Args:
        tokens: the most positions in all. None keeps every window.
    """
    if tokens is None:
        return list(windows)
    chosen: list[int] = []
    remaining = tokens
    for index in np.random.default_rng(seed).permutation(len(windows)).tolist():
        size = windows[index].positions
        if size <= remaining:
            chosen.append(index)
            remaining -= size
        if remaining <= 0:
            break
    return [windows[index] for index in sorted(chosen)]
