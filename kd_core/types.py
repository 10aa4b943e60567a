"""The legend of shapes, and the values that travel between data, students and losses.

    B  rows of a batch          T  positions in a row       N  B·T flattened positions
    V  real vocabulary          K  teacher entries a position   D  hidden size

Position t of a row holds input token t; its teacher entries and its label speak of token t+1. That shift
was made once, when the record was written. Probabilities are natural logarithms (nats).
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class TeacherTopK(NamedTuple):
    """What the teacher said at N positions: its K likeliest tokens and the mass of all others.

    `log_probs` are true log-probabilities (over the whole real vocabulary), never renormalised. An entry that
    is not used has `log_probs` −inf and any id of the vocabulary. Sampled entries carry the logarithm of their
    importance weight instead, and may repeat an id. `tempered_tails` holds log Σ p^(1/τ) over all other tokens
    for each further temperature τ that the cache captured: it cannot be had from the entries.
    """

    ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    tail_log_prob: Float[Tensor, " N"]
    tempered_tails: tuple[tuple[float, Float[Tensor, " N"]], ...] = ()


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents with the teacher's entries. `document_ids` is −1 on padding.

    `damaged_blocks` counts blocks of a cache whose records were left out of rows such as these.
    """

    tokens: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    document_ids: Int[Tensor, "B T"]
    topk_token_ids: Int[Tensor, "B T K"]
    topk_log_probs: Float[Tensor, "B T K"]
    tail_log_prob: Float[Tensor, "B T"]
    label_log_prob: Float[Tensor, "B T"]
    tempered_tails: tuple[tuple[float, Float[Tensor, "B T"]], ...] = ()
    record_names: tuple[str, ...] = ()
    damaged_blocks: int = 0

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        tails = tuple((temperature, tail.to(device)) for temperature, tail in self.tempered_tails)
        return replace(self, **moved, tempered_tails=tails)

    def unscored(self) -> Self:
        """The same shape with nothing to learn from, for a rank that takes part in a pass without rows of its own."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask), record_names=(), damaged_blocks=0)

    def teacher(self) -> TeacherTopK:
        """The teacher's entries, flattened to N positions."""
        return TeacherTopK(
            self.topk_token_ids.flatten(0, 1).long(),
            self.topk_log_probs.flatten(0, 1),
            self.tail_log_prob.flatten(),
            tuple((temperature, tail.flatten()) for temperature, tail in self.tempered_tails),
        )
