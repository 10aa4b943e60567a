"""Scorers: the interface to teachers, our decoder behind it, and the scoring of rows of tokens.

tokens, document ids ──Scorer.logits──► logits [n, V], a chunk at a time ──select──► Scores of N positions

On the ranks of a tensor-parallel group, V is that of the rank's slice of the vocabulary (`vocab_slices.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from data.cache.selection import Selection
from data.teacher.entry_scorer import EntryScorer
from data.teacher.select import TeacherScores, select_entries
from data.teacher.teacher_layout import ALONE, ScorerRanks, TeacherParallel
from data.teacher.vocab_slices import vocab_slice
from kd_core.logit_products import chunk_positions, multiply_, product_weight
from kd_core.parallel.layout import Layout, StudentSizes, check_divisible
from kd_core.parallel.parallelize import parallelize_frozen
from kd_core.parallel.world import World
from kd_core.sharded_values import local_values
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.starts.start import Pretrained, meta_student
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


def ranks_of(scorer: object) -> ScorerRanks:
    """Returns the ranks that a scorer shares its passes with. A scorer without `ranks` scores alone."""
    return getattr(scorer, "ranks", ALONE)


def check_fits(arch: Architecture, layout: Layout) -> None:
    """Checks that tensor-parallel ranks can share our decoder.

    Raises:
        UsageError: they cannot. The message names the numbers that would fit.
    """
    check_divisible(layout.tensor, sequence_parallel=False, shape=StudentSizes.from_architecture(arch, 1))


def _local_lm_head(hidden: Tensor, weight: Tensor) -> tuple[Float[Tensor, "N D"], Float[Tensor, "V D"]]:
    """Returns the hidden states of all positions, and this rank's rows of the lm_head."""
    return rearrange(local_values(hidden), "B T D -> (B T) D"), local_values(weight).detach()


@dataclass
class DecoderScorer:
    """Our own decoder. Logits exist a chunk at a time, and are float32 whatever the dtype of the weights."""

    model: Student
    ranks: ScorerRanks = ALONE
    _lm_head: Tensor | None = None

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, tokens: int | None, parallel: TeacherParallel, world: World
    ) -> "DecoderScorer":
        """Loads a teacher over the ranks of a world. No rank ever holds more of it than its layout says.

        Raises:
            UsageError: the layout does not fit the teacher, or its weights are damaged.
        """
        start = Pretrained(str(folder))
        model = meta_student(start, tokens)
        check_fits(model.arch, world.layout)
        precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
        model = parallelize_frozen(model, parallel.engine(precision), world, dtype).eval()
        start.fill(model, 0)
        return cls(model, ScorerRanks.of_world(world, vocab_slice(world, model.arch.vocab_rows)))

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        # Hidden states of all positions [N, D]; the head follows chunk by chunk, so that [N, V] never exists. FSDP
        # gathers the head in the first pass and keeps it, so that it can be used behind the pass.
        hidden, rows = self.model(tokens, positions, document_ids, _local_lm_head)
        if self._lm_head is None:
            # Only real tokens, without padding. A rank of padding alone has one column of no probability.
            self._lm_head = product_weight(rows[: self._real_columns])
        # Slices differ in their columns, but all ranks make the same chunks, because each chunk is exchanged.
        weight, form = self._lm_head, self.model.lm_head_form
        columns = -(-self.model.arch.vocab_size // self.ranks.layout.tensor)
        chunk_size = chunk_positions(columns, hidden.device)
        buffer = torch.empty(min(len(hidden), chunk_size), len(weight), device=hidden.device)
        for chunk in hidden.split(chunk_size):
            logits = buffer[: len(chunk)]
            if len(weight):
                multiply_(chunk, weight, logits, hidden.dtype)
            yield form.to_logits(logits) if len(weight) else logits.new_full((len(chunk), 1), -torch.inf)

    @property
    def _real_columns(self) -> int:
        return max(0, self.model.arch.vocab_size - self.ranks.vocab.first)


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
        scores = select_entries(logits, labels[positions], selection, uniforms[positions], ranks_of(scorer).vocab)
        chunks.append(scores)
    return TeacherScores(*(torch.cat(fields) for fields in zip(*chunks, strict=True)))
