"""A scorer over hidden states that another engine computes: our own head, and so every selection."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from data.teacher.separate_head import SeparateHead
from kd_core.logit_products import chunk_positions

HiddenStates = Callable[[list[list[int]]], Sequence[Tensor]]
"""Returns the hidden states [n, D] behind the final norm, of each row of n tokens. Several threads call it at once."""


class HiddenStateScorer:
    """An engine's hidden states through a model family's head, in float32 whatever the dtype of the engine."""

    def __init__(self, states: HiddenStates, head: SeparateHead, device: torch.device) -> None:
        self.states, self.head, self.device = states, head, device

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        # The engine gets the real positions of each row, of any lengths.  lengths [B]
        lengths = (document_ids >= 0).sum(dim=1).tolist()
        rows = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        # Padding between the rows has hidden states of zeros, and nobody reads its scores.  [B, T, D]
        hidden = torch.zeros(*tokens.shape, self.head.width, device=self.device)
        for row, n, states in zip(hidden, lengths, self.states(rows), strict=True):
            row[:n] = states
        for chunk in hidden.flatten(0, 1).split(chunk_positions(self.head.vocab_size, self.device)):
            yield self.head(chunk)
