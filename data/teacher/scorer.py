"""Scorers: the interface to teachers, our decoder behind it, and the scoring of rows of tokens.

tokens, document ids ──Scorer.logits──► logits [n, V], a chunk at a time ──select──► Scores of N positions
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from data.cache.selection import Selection
from data.teacher.entry_scorer import EntryScorer
from data.teacher.select import TeacherScores, select_entries
from kd_core.logit_products import chunk_positions, multiply_, product_weight
from kd_core.students.student import Student


@runtime_checkable
class Scorer(Protocol):
    """Anything that returns the logits of a causal language model. Several threads call it at once."""

    @property
    def device(self) -> torch.device:
        """Returns the device that `tokens` must be on."""
        ...

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        """Yields float32 logits [n, V] over the real vocabulary, for all N = B·T positions in order, n at a time.

        A row is one document, padded on its right (document −1). The caller may overwrite the logits.
        """
        ...


AnyScorer = Scorer | EntryScorer


@dataclass(frozen=True)
class DecoderScorer:
    """Our own decoder. Logits exist a chunk at a time, and are float32 whatever the dtype of the weights."""

    model: Student

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @cached_property
    def _lm_head(self) -> Float[Tensor, "V D"]:
        """Returns the rows of the real vocabulary, without padding."""
        return product_weight(self.model.plain_lm_head.detach())

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

        def flatten_positions(hidden: Tensor, _: Tensor) -> Tensor:
            return rearrange(hidden, "B T D -> (B T) D")

        # Hidden states of all positions [N, D]; the head follows chunk by chunk, so that [N, V] never exists.
        weight, hidden = self._lm_head, self.model(tokens, positions, document_ids, flatten_positions)
        chunk_size = chunk_positions(len(weight), hidden.device)
        buffer = torch.empty(min(len(hidden), chunk_size), len(weight), device=hidden.device)
        for chunk in hidden.split(chunk_size):
            logits = buffer[: len(chunk)]
            multiply_(chunk, weight, logits, hidden.dtype)
            yield logits


@torch.no_grad()
def score_rows(
    scorer: AnyScorer,
    tokens: Int[Tensor, "B S"],
    document_ids: Int[Tensor, "B T"],
    selection: Selection,
    uniforms: Float[Tensor, "N draws"],
) -> TeacherScores:
    """Scores positions 0 … T−1 of rows of S = T + 1 tokens, flattened to N = B·T.

    Args:
        uniforms: numbers in [0, 1) that decide the draws of a selection with samples.
    """
    if isinstance(scorer, EntryScorer):
        return scorer.scores(tokens, document_ids, selection)
    # Position t predicts token t + 1.  [N]
    labels = tokens[:, 1:].flatten()
    chunks: list[TeacherScores] = []
    start = 0
    for logits in scorer.logits(tokens[:, :-1], document_ids):
        positions = slice(start, start := start + len(logits))
        chunks.append(select_entries(logits, labels[positions], selection, uniforms[positions]))
    return TeacherScores(*(torch.cat(fields) for fields in zip(*chunks, strict=True)))
