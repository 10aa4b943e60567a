"""The legend of shapes, and the values that data, students and losses exchange.

    B  rows of a batch          T  positions in a row       N  B·T flattened positions
    V  real vocabulary          K  teacher entries a position   D  hidden size

Position t of a packed row holds input token t. Its teacher entries and its label describe token t+1. That shift
was made once, when the cache record was written. Probabilities are natural logarithms (nats).

One word, one meaning, everywhere:

    entries            the teacher's stored tokens of a position, with their log-probabilities
    lm_head            the output layer, hidden states [N, D] to logits [N, V]
    attention heads    the parallel parts of an attention layer
    vocab shard        the slice of the vocabulary that one rank of a tensor-parallel group holds
    transformer block  one layer of a student: attention and feed-forward
    cache block        some 8,000 positions of whole cache records, encoded, hashed and read as one
    packed row         cache records end to end in one row of a batch, padded to T positions
    corpus row         one text file, or one row of a data file, which becomes a document
    cache record       the positions of one window of a document, with the teacher's entries at each
    frozen config      the graph of an experiment with every value explicit, as `config.json` holds it
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd_core.document_lengths import Documents
from kd_core.errors import UsageError


class TeacherTopK(NamedTuple):
    """The teacher's stored distribution at N positions: its K likeliest tokens, and the mass of all others (tail).

    `log_probs` are true log-probabilities (over the whole real vocabulary), never renormalised. An unused entry has
    `log_probs` −inf and any id of the vocabulary. Sampled entries carry the logarithm of their importance weight
    instead, and may repeat an id. `tempered_tails` holds log Σ p^(1/τ) over all other tokens for each further
    temperature τ that the cache captured, because it cannot be computed from the entries.
    """

    ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    tail_log_prob: Float[Tensor, " N"]
    tempered_tails: tuple[tuple[float, Float[Tensor, " N"]], ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> "TeacherTopK":
        """Applies a function to the ids, log-probabilities and every tail."""
        tails = tuple((temperature, function(tail)) for temperature, tail in self.tempered_tails)
        return TeacherTopK(function(self.ids), function(self.log_probs), function(self.tail_log_prob), tails)


@dataclass(frozen=True)
class LmHeadForm:
    """Operations that a student applies to `hidden @ weight.T`.

    Args:
        bias: added to each logit, and trained where it requires a gradient.
        vocab_size: the real vocabulary. Rows of `weight` beyond it are padding and enter no softmax.
        scale: factor on the product (Cohere, Granite).
        soft_cap: bound c of the logits, which become c · tanh(logits / c) (Gemma 2: 30). On a CPU it costs one more
            buffer of logits.
    """

    bias: Float[Tensor, " V"] | None = None
    vocab_size: int | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise UsageError(f"head.soft_cap: got {self.soft_cap}; wanted more than 0, or None.")

    def to_logits(self, product: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
        """Returns logits from the product of hidden states and the rows of real tokens."""
        product = product if self.scale == 1 else self.scale * product
        product = product if self.bias is None else product + self.bias[: product.shape[-1]]
        return product if self.soft_cap is None else self.soft_cap * torch.tanh(product / self.soft_cap)


@dataclass(frozen=True)
class Batch:
    """Packed rows of documents with the teacher's entries. `document_ids` is −1 on padding.

    `documents` are the runs of equal `document_ids`. Without them, a student reads the ids, which waits for a device.
    `damaged_blocks` counts cache blocks whose records were left out while these rows were packed.
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
    documents: Documents | None = None
    record_names: tuple[str, ...] = ()
    damaged_blocks: int = 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Applies a function to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        tails = tuple((temperature, function(tail)) for temperature, tail in self.tempered_tails)
        documents = None
        if self.documents is not None:
            documents = replace(self.documents, cu_seqlens=function(self.documents.cu_seqlens))
        return replace(self, **mapped, tempered_tails=tails, documents=documents)

    def to(self, device: torch.device) -> Self:
        """Returns the same batch on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def unscored(self) -> Self:
        """Returns a batch of the same shape that is padding alone, for a rank that has no rows left for a pass."""
        no_document, no_score = torch.full_like(self.document_ids, -1), torch.zeros_like(self.loss_mask)
        return replace(self, document_ids=no_document, loss_mask=no_score, record_names=(), damaged_blocks=0)

    def teacher(self) -> TeacherTopK:
        """Returns the teacher's entries, flattened from [B, T, …] to [N, …]."""
        return TeacherTopK(
            self.topk_token_ids.flatten(0, 1).long(),
            self.topk_log_probs.flatten(0, 1),
            self.tail_log_prob.flatten(),
            tuple((temperature, tail.flatten()) for temperature, tail in self.tempered_tails),
        )

    def targets(self) -> tuple[TeacherTopK, Int[Tensor, " N"], Bool[Tensor, " N"]]:
        """Returns what a loss compares the student with: the teacher's entries, labels and mask of N positions."""
        return self.teacher(), self.labels.flatten(), self.loss_mask.flatten()
