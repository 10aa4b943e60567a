"""The teacher as a scorer: tokens in, its K likeliest next tokens with true log-probabilities and the tail out."""

from typing import NamedTuple

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
def score(model: Decoder, tokens: Int[Tensor, "B S"], document_ids: Int[Tensor, "B T"], k: int) -> Scores:
    """Scores of positions 0 … T−1 of rows of S = T + 1 tokens, flattened to N = B·T; logits exist a chunk at a time."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
    positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)

    def head(hidden: Tensor, weight: Tensor) -> Scores:
        flat = rearrange(hidden, "B T D -> (B T) D")
        buffer = torch.empty(min(len(flat), CHUNK_TOKENS), len(weight), device=flat.device, dtype=flat.dtype)
        parts: list[Scores] = []
        for start in range(0, len(flat), CHUNK_TOKENS):
            chunk = flat[start : start + CHUNK_TOKENS]
            logits = torch.mm(chunk, weight.t(), out=buffer[: len(chunk)]).float()
            parts.append(score_chunk(logits, labels[start : start + CHUNK_TOKENS], k))
        return Scores(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    return model(inputs, positions, document_ids, head)
