"""The teacher as a scorer: tokens in, what a selection keeps of its distribution out."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from data.cache.selection import Selection
from data.teacher.select import Scores, select
from kd_core.students.decoder.decoder import Decoder

CHUNK_TOKENS = 256


@runtime_checkable
class Scorer(Protocol):
    """Anything that gives the logits of a causal language model; called by several threads at once."""

    @property
    def device(self) -> torch.device:
        """Where its tokens are to lie."""
        ...

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        """Float32 logits [n, V] over the real vocabulary, for all N = B·T positions in order, some at a time.

        A row is one document, padded on its right (document −1). The caller may overwrite what it is given.
        """
        ...


@dataclass(frozen=True)
class DecoderScorer:
    """Our own decoder. Logits exist a chunk at a time, and are float32 whatever the weights are."""

    model: Decoder

    @property
    def device(self) -> torch.device:
        """Where its tokens are to lie."""
        return self.model.embed_tokens.weight.device

    @cached_property
    def _lm_head(self) -> Float[Tensor, "V D"]:
        """The real vocabulary's rows. On a CPU in float32, where a matmul of bfloat16 gives bfloat16 alone."""
        weight = self.model.lm_head.weight[: self.model.arch.vocab_size].detach()
        return weight.float() if weight.device.type == "cpu" else weight

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        """See `Scorer`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

        def flattened(hidden: Tensor, _: Tensor) -> Tensor:
            return rearrange(hidden, "B T D -> (B T) D")

        weight = self._lm_head
        hidden = self.model(tokens, positions, document_ids, flattened).to(weight.dtype)
        wide = {} if weight.device.type == "cpu" else {"out_dtype": torch.float32}
        buffer = torch.empty(min(len(hidden), CHUNK_TOKENS), len(weight), device=hidden.device)
        for chunk in hidden.split(CHUNK_TOKENS):
            # A logit of 20 rounded to bfloat16 is off by up to 0.06, far more than the codec's error.
            yield torch.mm(chunk, weight.t(), **wide, out=buffer[: len(chunk)])


@torch.no_grad()
def score(
    scorer: Scorer,
    tokens: Int[Tensor, "B S"],
    document_ids: Int[Tensor, "B T"],
    selection: Selection,
    uniforms: Float[Tensor, "N draws"],
) -> Scores:
    """Scores of positions 0 … T−1 of rows of S = T + 1 tokens, flattened to N = B·T."""
    labels = tokens[:, 1:].flatten()
    parts: list[Scores] = []
    at = 0
    for logits in scorer.logits(tokens[:, :-1], document_ids):
        own = slice(at, at := at + len(logits))
        parts.append(select(logits, labels[own], selection, uniforms[own]))
    return Scores(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
