"""Adapters of a student as those of the linear layers of its folder, where several layers may be joined in one.

Layers q, k and v of y_p = W_p x + s B_p A_p x are one layer y = W x + s B A x of the folder. Its W has the rows of all
W_p, its A the rows of all A_p, and its B has the B_p as blocks along its diagonal, so the rank is the sum of ranks. An
adapter that was trained on the joined layer has one A for all of them. Then each A_p begins as that A.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_core.errors import UsageError
from kd_core.sharded_values import Box, fill_sharded, full_tensor
from kd_core.students.decoder.lora_layers import LoraLinear, adapted_layers
from kd_core.students.families.registry import FAMILIES
from kd_core.students.huggingface.weights import StoredTensor
from kd_core.students.student import Student


class Part(NamedTuple):
    """An adapted layer of the student, and the rows of its outputs among those of the folder's layer."""

    layer: LoraLinear
    rows: slice


class FolderAdapter(NamedTuple):
    """The adapter of one linear layer of the folder, by its name inside the model, and its parts in the student."""

    name: str
    outputs: int
    parts: list[Part]

    @property
    def rank(self) -> int:
        """Returns the sum of the parts' ranks."""
        return len(self.parts) * self.parts[0].layer.settings.rank

    @property
    def alpha(self) -> float:
        """Returns the alpha that keeps the scale, as alpha / rank or alpha / √rank."""
        settings, times = self.parts[0].layer.settings, len(self.parts)
        return settings.alpha * (math.sqrt(times) if settings.rank_stabilised else times)

    def gather_a(self) -> Tensor:
        """Returns the whole A [rank, in] on every rank. All ranks must call it together."""
        return torch.cat([full_tensor(part.layer.lora_A) for part in self.parts])

    def gather_b(self) -> Tensor:
        """Returns the whole B [out, rank] on every rank. All ranks must call it together."""
        values = [full_tensor(part.layer.lora_B) for part in self.parts]
        whole = values[0].new_zeros(self.outputs, self.rank)
        for value, part, columns in zip(values, self.parts, self._columns(self.rank), strict=True):
            whole[part.rows, columns] = value
        return whole

    def _columns(self, rank: int) -> Iterator[slice]:
        """Yields the columns of B that each part has: its own of all, or if they share one A, all of them."""
        part_rank = self.parts[0].layer.settings.rank
        for number in range(len(self.parts)):
            first = number * part_rank if rank == self.rank else 0
            yield slice(first, first + part_rank)

    def fill(self, which: str, stored: StoredTensor, rank: int) -> None:
        """Copies `lora_A` or `lora_B` of the folder's layer, which has this rank, into the student's adapters.

        Raises:
            UsageError: the tensor has another shape, values that are not finite, or values for layers without adapters.
        """
        inputs = self.parts[0].layer.in_features
        shape = (rank, inputs) if which == "lora_A" else (self.outputs, rank)
        if stored.shape != shape:
            raise UsageError(f"{stored.path}: found {stored.name} of shape {stored.shape}; wanted shape {shape}.")
        boxes: list[Box] = [
            (columns, slice(0, inputs)) if which == "lora_A" else (part.rows, columns)
            for part, columns in zip(self.parts, self._columns(rank), strict=True)
        ]
        for part, box in zip(self.parts, boxes, strict=True):
            fill_sharded(getattr(part.layer, which), functools.partial(_read_inside, stored, box))
        if which == "lora_B":
            _check_rest(stored, boxes)


def _check_rest(stored: StoredTensor, boxes: list[Box]) -> None:
    """Raises where values outside of the boxes are not zero."""
    covered = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in boxes)
    if covered == math.prod(stored.shape):
        return
    rest = stored.read(tuple(slice(0, size) for size in stored.shape)).clone()
    for box in boxes:
        rest[box] = 0
    if rest.any():
        raise UsageError(
            f"{stored.path}: {stored.name} also adapts outputs of layers without an adapter here, for the folder joins "
            "these layers. Adapt all of them (attention_qkv and mlp_fc1 of student.targets)."
        )


def _read_inside(stored: StoredTensor, outer: Box, box: Box) -> Tensor:
    """Reads a box whose bounds count from the beginning of the box `outer`."""
    inner = (slice(part.start + whole.start, part.stop + whole.start) for part, whole in zip(box, outer, strict=True))
    return stored.read(tuple(inner))


def folder_adapters(model: Student) -> list[FolderAdapter]:
    """Returns the adapters of a student by the linear layers of its folder, in the student's order."""
    layers = adapted_layers(model)
    if not model.names_in_folder:  # those of the folder
        return [
            FolderAdapter(name, layer.out_features, [Part(layer, slice(0, layer.out_features))])
            for name, layer in layers.items()
        ]
    family, adapters = FAMILIES[model.arch.family], list[FolderAdapter]()
    for name in dict.fromkeys(map(family.joined_name, layers)):
        parts, first = list[Part](), 0
        for part_name in family.names_of_parts(name):
            linear = model.get_submodule(part_name)
            assert isinstance(linear, nn.Linear)
            if part_name in layers:
                parts.append(Part(layers[part_name], slice(first, first + linear.out_features)))
            first += linear.out_features
        adapters.append(FolderAdapter(name, first, parts))
    return adapters


def rank_fields(adapters: list[FolderAdapter]) -> dict[str, dict[str, int | float]]:
    """Returns PEFT's fields of ranks and alphas for layers whose rank is not that of the student's adapters."""
    by_last = {adapter.name.rsplit(".", 1)[1]: adapter for adapter in adapters}
    # A last name stands for all its layers if they have one rank. Otherwise layers have their full names.
    is_same = all(adapter.rank == by_last[adapter.name.rsplit(".", 1)[1]].rank for adapter in adapters)
    named = by_last if is_same else {f"model.{adapter.name}": adapter for adapter in adapters}
    joined = {name: adapter for name, adapter in named.items() if len(adapter.parts) > 1}
    return {
        "rank_pattern": {name: adapter.rank for name, adapter in joined.items()},
        "alpha_pattern": {name: adapter.alpha for name, adapter in joined.items()},
    }
