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
from data.teacher.select import TeacherScores, select_entries
from kd_core.students.student import Student

CHUNK_TOKENS = 256  # positions whose logits exist at a time


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


@dataclass(frozen=True)
class DecoderScorer:
    """Our own decoder. Logits exist a chunk at a time, and are float32 whatever the dtype of the weights."""

    model: Student

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @cached_property
    def _lm_head(self) -> Float[Tensor, "V D"]:
        """Returns the rows of the real vocabulary, without padding.

        On a CPU they are float32, because a matmul of bfloat16 there can only return bfloat16.
        """
        weight = self.model.plain_lm_head.detach()
        return weight.float() if weight.device.type == "cpu" else weight

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

        def flatten_positions(hidden: Tensor, _: Tensor) -> Tensor:
            return rearrange(hidden, "B T D -> (B T) D")

        # Hidden states of all positions [N, D]; the head follows chunk by chunk, so that [N, V] never exists.
        weight = self._lm_head
        hidden = self.model(tokens, positions, document_ids, flatten_positions).to(weight.dtype)
        # On a GPU a matmul of bfloat16 can return float32.
        matmul_dtype = {} if weight.device.type == "cpu" else {"out_dtype": torch.float32}
        buffer = torch.empty(min(len(hidden), CHUNK_TOKENS), len(weight), device=hidden.device)
        for chunk in hidden.split(CHUNK_TOKENS):
            # A logit of 20 rounded to bfloat16 is off by up to 0.06, far more than the codec's error.
            yield torch.mm(chunk, weight.t(), **matmul_dtype, out=buffer[: len(chunk)])


@torch.no_grad()
def score_rows(
    scorer: Scorer,
    tokens: Int[Tensor, "B S"],
    document_ids: Int[Tensor, "B T"],
    selection: Selection,
    uniforms: Float[Tensor, "N draws"],
) -> TeacherScores:
    """Scores positions 0 … T−1 of rows of S = T + 1 tokens, flattened to N = B·T.

    Args:
        uniforms: numbers in [0, 1) that decide the draws of a selection with samples.
    """
    # Position t predicts token t + 1.  [N]
    labels = tokens[:, 1:].flatten()
    chunks: list[TeacherScores] = []
    start = 0
    for logits in scorer.logits(tokens[:, :-1], document_ids):
        positions = slice(start, start := start + len(logits))
        chunks.append(select_entries(logits, labels[positions], selection, uniforms[positions]))
    return TeacherScores(*(torch.cat(fields) for fields in zip(*chunks, strict=True)))
