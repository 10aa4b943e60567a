"""How ranks are laid out, as plain numbers: what each does, what fits, and what each holds. No process is needed.

Rank r of dp_replicate × dp_shard × tp has the tensor-parallel position r mod tp; neighbours share a model's tensors,
so they should share a machine.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kd_core.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """The numbers of a student and its rows that a layout must divide."""

    heads: int
    kv_heads: int
    intermediate: int
    vocab_rows: int
    row_length: int


@dataclass(frozen=True)
class Layout:
    """Whole copies of the student, ranks that share one copy by sharding it, and ranks that share its tensors."""

    replicas: int = 1
    shards: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """All ranks."""
        return self.replicas * self.shards * self.tensor

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.replicas * self.shards

    def __str__(self) -> str:
        return f"{self.replicas} replicas × {self.shards} shards × {self.tensor} tensor-parallel"


def _fits(tensor: int, shape: Shape) -> bool:
    """Whether so many ranks can share a student's heads, feed-forward and vocabulary."""
    wide = shape.heads % tensor == 0 and shape.intermediate % tensor == 0
    kv = shape.kv_heads % tensor == 0 or tensor % shape.kv_heads == 0
    return wide and kv and (tensor - 1) * math.ceil(shape.vocab_rows / tensor) < shape.vocab_rows


def check_shape(tensor: int, sequence_parallel: bool, shape: Shape) -> None:
    """Refuse a student or rows that so many tensor-parallel ranks cannot share.

    Raises:
        UsageError: heads, kv heads, feed-forward, vocabulary or row length; with what would fit.
    """
    if not _fits(tensor, shape):
        fitting = [str(n) for n in range(1, shape.heads + 1) if _fits(n, shape)]
        raise UsageError(
            f"parallel.tensor_parallel: got {tensor}, which does not divide the student's {shape.heads} heads "
            f"({shape.kv_heads} for keys and values, which also divide {tensor} or are divided by it), feed-forward "
            f"width {shape.intermediate}, or leaves a rank without any of {shape.vocab_rows} rows of the vocabulary. "
            f"Fitting: {', '.join(fitting)}."
        )
    if sequence_parallel and shape.row_length % tensor:
        raise UsageError(
            f"parallel.sequence_parallel: rows of {shape.row_length} positions are not divided by tensor_parallel "
            f"{tensor}. Take a multiple of it as collate.row_length (or as collate.multiple, with padding=longest)."
        )


def lay_out(size: int, tensor: int, replicas: int | None) -> Layout:
    """`size` ranks in `replicas` copies (None: no sharding, as many as there are) of tensor-parallel groups.

    Raises:
        UsageError: the numbers do not divide each other; with what would fit.
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
class Holding:
    """What the fullest rank holds between steps, in numbers: parameters, and two float32 moments of trained ones."""

    parameters: int
    trained: int

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's moments, float32."""
        return 8 * self.trained


def holding(layout: Layout, parameters: Iterable[tuple[tuple[int, ...], int | None, bool]]) -> Holding:
    """Of parameters as (shape, dimension that tensor parallelism divides or None, trained)."""
    held = trained = 0
    for shape, divided, learns in parameters:
        sizes = list(shape)
        if divided is not None:
            sizes[divided] = math.ceil(sizes[divided] / layout.tensor)
        sizes[0] = math.ceil(sizes[0] / layout.shards)
        held += math.prod(sizes)
        trained += math.prod(sizes) if learns else 0
    return Holding(held, trained)
