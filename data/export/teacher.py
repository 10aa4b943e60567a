"""The teacher as a scorer: tokens in, its K likeliest next tokens with true log-probabilities and the tail out."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from kd_core.students.decoder import Decoder

CHUNK_TOKENS = 256


class Scores(NamedTuple):
    """What a teacher said at N positions."""

    ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    tail_log_prob: Float[Tensor, " N"]
    label_log_prob: Float[Tensor, " N"]


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


class DecoderScorer(NamedTuple):
    """Our own decoder; logits exist a chunk at a time."""

    model: Decoder

    @property
    def device(self) -> torch.device:
        """Where its tokens are to lie."""
        return self.model.embed_tokens.weight.device

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        """See `Scorer`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

        def parts(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return rearrange(hidden, "B T D -> (B T) D"), weight

        hidden, weight = self.model(tokens, positions, document_ids, parts)
        buffer = torch.empty(min(len(hidden), CHUNK_TOKENS), len(weight), device=hidden.device, dtype=hidden.dtype)
        for chunk in hidden.split(CHUNK_TOKENS):
            yield torch.mm(chunk, weight.t(), out=buffer[: len(chunk)]).float()


def score_chunk(logits: Float[Tensor, "n V"], labels: Int[Tensor, " n"], k: int) -> Scores:
    """Scores from logits, which are overwritten: the tail is summed over what the top-k leaves, never as 1 − Σp.

    One softmax in place gives the tail's log-sum-exp as (largest logit − its log-probability): on a CPU that is many
    times faster than `torch.logsumexp`, which falls into denormal numbers on peaked rows.
    """
    values, ids = logits.topk(k)
    label = logits.gather(1, labels[:, None]).squeeze(1)
    logits.scatter_(1, ids, -torch.inf)
    largest = logits.amax(dim=1)
    tail = largest - torch.softmax(logits, dim=1, out=logits).amax(dim=1).log()
    normaliser = torch.logaddexp(values.logsumexp(dim=1), tail)
    return Scores(ids, values - normaliser[:, None], tail - normaliser, label - normaliser)


@torch.no_grad()
def score(scorer: Scorer, tokens: Int[Tensor, "B S"], document_ids: Int[Tensor, "B T"], k: int) -> Scores:
    """Scores of positions 0 … T−1 of rows of S = T + 1 tokens, flattened to N = B·T."""
    labels = tokens[:, 1:].flatten()
    parts: list[Scores] = []
    at = 0
    for logits in scorer.logits(tokens[:, :-1], document_ids):
        parts.append(score_chunk(logits, labels[at : at + len(logits)], k))
        at += len(logits)
    return Scores(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
