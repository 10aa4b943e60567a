"""Layouts of ranks as plain numbers: sizes of the mesh, what fits a student, and what a rank holds. Needs no process.

Rank r of dp_replicate × dp_shard × tp has the tensor-parallel position r mod tp. Ranks with neighbouring numbers share
a model's tensors, so they should be on one machine.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture


@dataclass(frozen=True)
class StudentSizes:
    """Sizes of a student and its packed rows that a layout must divide. `heads` are attention heads.

    `intermediate` is 0 where no layer has a dense feed-forward, and `experts` where none has experts.
    """

    heads: int
    kv_heads: int
    intermediate: int
    vocab_rows: int
    row_length: int
    experts: int = 0

    @classmethod
    def from_architecture(cls, arch: Architecture, row_length: int) -> "StudentSizes":
        """Returns the sizes of a decoder on rows of so many positions."""
        has_dense_layers = arch.experts is None or bool(arch.dense_layers)
        return cls(
            arch.num_heads,
            arch.num_kv_heads,
            arch.intermediate_size if has_dense_layers else 0,
            arch.vocab_rows,
            row_length,
            0 if arch.experts is None else arch.experts.count,
        )


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh: whole copies of the student, shards of one copy, and tensor-parallel ranks of one shard."""

    replicas: int = 1
    shards: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Counts all ranks."""
        return self.replicas * self.shards * self.tensor

    @property
    def data(self) -> int:
        """Counts the ranks that read different rows."""
        return self.replicas * self.shards

    def __str__(self) -> str:
        return f"{self.replicas} replicas × {self.shards} shards × {self.tensor} tensor-parallel"


def _fits(tensor: int, shape: StudentSizes) -> bool:
    """Checks that `tensor` ranks can share a student's attention heads, feed-forward and vocabulary.

    kv heads are divided, or repeated where they are fewer than the ranks. Vocabulary rows are divided in chunks of
    ⌈rows / tensor⌉, of which the last rank must get at least one row.
    """
    divides_widths = all(size % tensor == 0 for size in (shape.heads, shape.intermediate, shape.experts))
    divides_kv = shape.kv_heads % tensor == 0 or tensor % shape.kv_heads == 0
    return divides_widths and divides_kv and (tensor - 1) * math.ceil(shape.vocab_rows / tensor) < shape.vocab_rows


def check_divisible(tensor: int, sequence_parallel: bool, shape: StudentSizes) -> None:
    """Checks that `tensor` tensor-parallel ranks can share a student and its packed rows.

    Raises:
        UsageError: heads, kv heads, feed-forward, vocabulary or row length do not fit. The message names what would.
    """
    if not _fits(tensor, shape):
        fitting = [str(n) for n in range(1, shape.heads + 1) if _fits(n, shape)]
        raise UsageError(
            f"parallel.tensor_parallel: got {tensor}, which does not divide the model's {shape.heads} heads "
            f"({shape.kv_heads} for keys and values, which also divide {tensor} or are divided by it), feed-forward "
            f"width {shape.intermediate}, {f'{shape.experts} experts, ' if shape.experts else ''}or leaves a rank "
            f"without any of {shape.vocab_rows} rows of the vocabulary. "
            f"Fitting: {', '.join(fitting)}."
        )
    if sequence_parallel and shape.row_length % tensor:
        raise UsageError(
            f"parallel.sequence_parallel: rows of {shape.row_length} positions are not divided by tensor_parallel "
            f"{tensor}. Take a multiple of it as collate.row_length (or as collate.multiple, with padding=longest)."
        )


def make_layout(size: int, tensor: int, replicas: int | None) -> Layout:
    """Returns a layout of `size` ranks: tensor-parallel groups of `tensor` ranks in `replicas` copies of the student.

    `replicas` None means no sharding: every tensor-parallel group has a copy.

    Raises:
        UsageError: the numbers do not divide each other. The message names what would fit.
    """
    if size % tensor:
        raise UsageError(
            f"parallel.tensor_parallel: got {tensor}, but {size} ranks are not divided by it. "
            f"Start a multiple of {tensor} (torchrun --nproc-per-node), or take one of {_divisors(size)}."
        )
    data = size // tensor
    copies = data if replicas is None else replicas
    if data % copies:
        raise UsageError(
            f"parallel.replicas: got {copies}, but {size} ranks in tensor-parallel groups of {tensor} make {data}, "
            f"which is not divided by it. Take one of {_divisors(data)}."
        )
    return Layout(copies, data // copies, tensor)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


@dataclass(frozen=True)
class RankHolding:
    """Counts of numbers that the fullest rank holds between steps, and that it gathers in a pass.

    `parameters` are those between steps, of which `trained` are trained. Gathered from the ranks that share them, all
    transformer blocks have `block_numbers`, the largest of them `largest_block`, and everything outside of blocks
    `root_numbers`. Of all these, `gathered_trained` are trained.
    """

    parameters: int
    trained: int
    block_numbers: int
    largest_block: int
    root_numbers: int
    gathered_trained: int

    @property
    def optimizer_bytes(self) -> int:
        """Returns the bytes of AdamW's two moments, in float32."""
        return 8 * self.trained


class ParameterFacts(NamedTuple):
    """A parameter's shape, the dimension that tensor parallelism divides, its transformer block, and if it trains."""

    shape: tuple[int, ...]
    divided_dimension: int | None
    block: int | None
    is_trained: bool


def holding_of_fullest_rank(layout: Layout, parameters: Iterable[ParameterFacts]) -> RankHolding:
    """Returns what the fullest rank of a layout holds. Sharding divides dimension 0."""
    total = trained = gathered_trained = 0
    gathered = Counter[int | None]()
    for shape, divided_dimension, block, is_trained in parameters:
        sizes = list(shape)
        if divided_dimension is not None:
            sizes[divided_dimension] = math.ceil(sizes[divided_dimension] / layout.tensor)
        gathered[block] += math.prod(sizes)
        gathered_trained += math.prod(sizes) * is_trained
        sizes[0] = math.ceil(sizes[0] / layout.shards)
        total += math.prod(sizes)
        trained += math.prod(sizes) * is_trained
    root = gathered.pop(None, 0)
    return RankHolding(total, trained, gathered.total(), max(gathered.values(), default=0), root, gathered_trained)
