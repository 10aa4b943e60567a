"""Shapes of training steps that counts, estimates and the device script share, and inputs for them."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from benchmarks.step import STUDENT as QUICK_START
from data.cache.record import Record
from data.stream.collate import Collate
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.students.decoder.architecture import Architecture
from kd_core.types import Batch

# The shapes of Llama 3.2 1B and Llama 3.1 8B, and one so small that only the number of its operations means anything.
LLAMA_1B = replace(
    QUICK_START, vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
    num_kv_heads=8, rope_theta=500000.0,
)  # fmt: skip
LLAMA_8B = replace(
    LLAMA_1B, hidden_size=4096, intermediate_size=14336, num_layers=32, head_dim=128, tie_embeddings=False
)
SMALL = replace(
    QUICK_START, vocab_size=512, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16,
)  # fmt: skip
STUDENTS = {"quick start": QUICK_START, "1B": LLAMA_1B, "small": SMALL}


def matmul_weights(arch: Architecture) -> int:
    """Counts the weights that multiply each position: all but norms and the embedding's look-up."""
    width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    block = arch.hidden_size * (2 * width + 2 * kv_width + 3 * arch.intermediate_size)
    return arch.num_layers * block + arch.vocab_size * arch.hidden_size


def objectives(chunk_tokens: int) -> dict[str, Objective]:
    """Returns the objectives that are counted and measured, by name."""
    ce, kd = CrossEntropy(weight=0.1), Distillation(weight=0.9)
    terms = {
        "CE": {"sft": CrossEntropy()},
        "KD": {"kd": Distillation()},
        "KD + CE": {"kd": kd, "sft": ce},
        "reverse KL + CE": {"kd": replace(kd, divergence="reverse_kl"), "sft": ce},
        "JSD + CE": {"kd": replace(kd, divergence="jsd"), "sft": ce},
        "KD at temperature 2 + CE": {"kd": replace(kd, tail="truncated", temperature=2.0), "sft": ce},
        "uniform tail + CE": {"kd": replace(kd, tail="uniform_tail"), "sft": ce},
        "renormalized": {"kd": Distillation(tail="renormalized")},
    }
    return {name: Objective(named_terms, chunk_tokens=chunk_tokens) for name, named_terms in terms.items()}


@dataclass(frozen=True)
class LossShape:
    """Sizes of a loss alone, forward and backward. With `autocast`, hidden states and weight are float32 under it."""

    positions: int = 8192
    vocab: int = 151936
    width: int = 4096
    top_k: int = 64
    objective: str = "KD + CE"
    chunk: int = 2048
    precision: Literal["bfloat16", "autocast"] = "bfloat16"

    @property
    def chunks(self) -> int:
        """Counts the chunks of the loss."""
        return -(-self.positions // self.chunk)

    @property
    def flops(self) -> float:
        """Returns the FLOPs of the three matmuls that no exact loss can do without."""
        return 6.0 * self.positions * self.vocab * self.width


@dataclass(frozen=True)
class StepShape:
    """Shape of a training step: `rows` packed rows of `length` positions, each of `documents` unequal documents."""

    student: str = "quick start"
    rows: int = 2
    length: int = 512
    top_k: int = 64
    documents: int = 1
    objective: str = "KD + CE"
    chunk: int = 256

    @property
    def architecture(self) -> Architecture:
        return STUDENTS[self.student]

    @property
    def positions(self) -> int:
        """Counts the positions of the step, N."""
        return self.rows * self.length

    @property
    def loss(self) -> LossShape:
        """Returns the sizes of the step's loss."""
        arch = self.architecture
        return LossShape(
            self.positions, arch.vocab_size, arch.hidden_size, self.top_k, self.objective, self.chunk, "autocast"
        )

    def document_lengths(self, seed: int = 0) -> list[list[int]]:
        """Returns the lengths of the documents of each row. They add up to the row's length."""
        random = np.random.default_rng(seed)
        rows: list[list[int]] = []
        for _ in range(self.rows):
            cuts = np.sort(random.choice(np.arange(1, self.length), self.documents - 1, replace=False))
            rows.append(np.diff(cuts, prepend=0, append=self.length).tolist())
        return rows

    def attention_pairs(self) -> int:
        """Counts the pairs of a query and a key that attention must compute, in all rows."""
        return sum(length * (length + 1) // 2 for row in self.document_lengths() for length in row)


def _record(random: np.random.Generator, positions: int, top_k: int, vocab: int) -> Record:
    """Returns random tokens with entries of random distinct ids, which have 0.9 of the mass."""
    logits = np.sort(random.normal(0, 2, (positions, top_k)), axis=1)[:, ::-1].astype(np.float32)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True) / 0.9)
    ids = (random.integers(vocab, size=(positions, 1)) + 97 * np.arange(top_k)) % vocab
    return Record(
        "", "document", 0, random.integers(vocab, size=positions + 1).astype(np.int32), np.ones(positions, np.uint8),
        ids.astype(np.int32), log_probs, np.full(positions, np.log(0.1), np.float32),
        np.full(positions, -3.0, np.float32),
    )  # fmt: skip


def pin(batch: Batch) -> Batch:
    """Returns a batch in page-locked memory, as the reading thread hands it on."""
    return batch.map(Tensor.pin_memory)


def make_batch(shape: StepShape, seed: int = 0) -> Batch:
    """Returns a batch on the CPU, as the project's own collation makes it from cache records."""
    random, vocab = np.random.default_rng(seed), shape.architecture.vocab_size
    rows = [
        [_record(random, length, shape.top_k, vocab) for length in lengths] for lengths in shape.document_lengths(seed)
    ]
    return Collate(row_length=shape.length)(rows)
