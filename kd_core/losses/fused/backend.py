"""The work of the loss on the logits [n, V] of a chunk of positions: all that depends on the device.

For each chunk, the pass over the vocabulary (`full_vocab.py`) calls in this order:

    logits_             hidden states [n, D] to logits, which the backend keeps
    tail_statistics_    numbers per position and entry that the losses need, for each temperature of the student
    tail_entropy, …     where a term or a metric asks for them
    add_gradients_      gradients by those numbers, to gradients by logits, to gradients by hidden states and weight

Everything between these calls works on [n, K] and is the same on all devices. A backend for a new kind of device, or
of fused kernels, implements this class, and is named in `choose_backend.py`. `torch_backend.py` does it with
torch operations, `triton_backend.py` with kernels. On a GPU no method may wait for a result (`if tensor.any()`).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients
from kd_core.losses.fused.vocab_shard import ShardColumns, VocabStats


class LogitGradients(NamedTuple):
    """τ dL/dlogits of one temperature, without writing out its [n, V] numbers.

    At column j it is `tail_factor` · s_j + `tail_offset`, s being the softmax over this shard's tail and 0 on the
    support. `entries` and `label` are added at their columns.
    """

    tail_factor: Float[Tensor, " n"]
    tail_offset: Float[Tensor, " n"] | None
    entries: Float[Tensor, "n K"]
    label: Float[Tensor, " n"]
    entry_columns: ShardColumns
    label_columns: ShardColumns


class LossBackend(ABC):
    """An lm_head on a kind of device, with the memory that its chunks share.

    Fresh memory costs more than what is written to it, so buffers are allocated once for all chunks of a call.

    Args:
        head: the lm_head.
        chunk_tokens: the largest number of positions in a chunk.
        temperatures: those of the student that terms need. 1 comes first, since all others are made from it.
    """

    gathered_rows: int
    """Rows of the lm_head that `topk_only.py` gathers at a time."""

    @staticmethod
    @abstractmethod
    def support_is_cheaper(entries: int, vocab_size: int) -> bool:
        """Returns true if the pass over so many entries a position costs less than the one over the vocabulary."""

    def __init__(self, head: LmHead, chunk_tokens: int, temperatures: Sequence[float]) -> None:
        self.head, self.chunk_tokens, self.temperatures = head, chunk_tokens, temperatures

    @staticmethod
    @abstractmethod
    def scale_(values: Tensor, factor: Float[Tensor, ""]) -> None:
        """Multiplies a gradient by a number, which is 1 in training."""

    @abstractmethod
    def logits_(self, hidden: Float[Tensor, "n D"]) -> None:
        """Computes the logits of a chunk and keeps them. They replace those of the chunk before."""

    @abstractmethod
    def tail_statistics_(
        self, entries: ShardColumns, labels: ShardColumns, sum_temperatures: Collection[float]
    ) -> dict[float, VocabStats]:
        """Computes one shard's statistics of logits / temperature. It may overwrite the logits with other numbers.

        Args:
            entries: columns of the teacher's entries [n, K].
            labels: columns of the labels [n, 1].
            sum_temperatures: temperatures at which `tail_sum` is read. It may be 0 at others.

        Returns:
            The statistics for each of `temperatures`.
        """

    @abstractmethod
    def tail_entropy(self) -> Float[Tensor, " n"]:
        """Returns −Σ s log s in nats, s being the softmax over this shard's tail at temperature 1.

        Called after `tail_statistics_`, as is `tail_power_sums`.
        """

    @abstractmethod
    def tail_power_sums(self) -> Float[Tensor, "n powers"]:
        """Returns Σ s^(e/8) over this shard's tail at temperature 1, for each e of `calibration.EIGHTHS`."""

    def begin_gradients_(self, gradients: LmHeadGradients) -> None:
        """Sets the gradient of the weight to 0, in as far as the first chunk does not overwrite it."""
        gradients.zero_weight_()

    @abstractmethod
    def add_gradients_(
        self,
        gradients: LmHeadGradients,
        positions: slice,
        hidden: Float[Tensor, "n D"],
        by_temperature: Mapping[float, LogitGradients],
    ) -> None:
        """Adds the gradients of the chunk whose logits are kept. It may overwrite the logits.

        Args:
            gradients: those of all chunks.
            positions: those of the chunk.
            hidden: their hidden states.
            by_temperature: the gradient by the logits for each temperature.
        """
