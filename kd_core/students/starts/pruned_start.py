"""A start from some layers, channels and attention heads of a Hugging Face folder (`width_selection.py`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.hub import resolve_folder
from kd_core.sharded_values import Box, errors_on_all_ranks
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.lora_layers import base_parameters
from kd_core.students.families.registry import FAMILIES, family_decoder
from kd_core.students.huggingface.weights import StoredTensor, load_weights, stored_architecture
from kd_core.students.student import Student
from kd_core.students.width_importance import NORMS, split_name
from kd_core.students.width_selection import WidthSelection


class CutTensor(StoredTensor):
    """Some rows and columns of a stored tensor, by increasing indices for each dimension, times a factor.

    With an `offset`, the tensor holds values less this offset (norms of Gemma).
    """

    def __init__(self, stored: StoredTensor, indices: list[Tensor], factor: float, offset: float = 0.0) -> None:
        self.path, self.name, self.slice = stored.path, stored.name, stored.slice
        self.stored, self.indices, self.factor, self.offset = stored, indices, factor, offset

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.indices))

    def read(self, box: Box) -> Tensor:
        """Returns the values of a box of the cut tensor. Reads all between its first and last rows and columns."""
        indices = [index[part] for index, part in zip(self.indices, box, strict=True)]
        bounds = [(int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0) for index in indices]
        values = self.stored.read(tuple(slice(*bound) for bound in bounds))
        for dimension, (index, (first, _)) in enumerate(zip(indices, bounds, strict=True)):
            values = values.index_select(dimension, index - first)
        return values if self.factor == 1 else (values.float() + self.offset) * self.factor - self.offset


@dataclass(frozen=True)
class PrunedStart:
    """A student of some layers and widths of a Hugging Face folder."""

    folder: str
    selection: WidthSelection

    def architecture(self) -> Architecture:
        return self.selection.arch

    def build_on_meta(self) -> Student:
        return family_decoder(self.selection.arch)

    def fill(self, model: Student, seed: int) -> None:
        """Loads the kept layers, channels and heads of the folder, a tensor at a time."""
        del seed  # nothing is random
        folder, parameters, rules = resolve_folder(self.folder), base_parameters(model), model.sharding_rules()
        stored_model = family_decoder(stored_architecture(folder).with_layers(self.selection.layers))
        shapes = {name: tuple(parameter.shape) for name, parameter in stored_model.named_parameters()}

        def cut(stored: StoredTensor, names: list[str]) -> StoredTensor:
            indices = [self.selection.indices(name, shapes[name], rules) for name in names]
            # Parameters that are joined in the folder follow each other in its rows, so each begins where the last
            # one of the model ends.
            starts = torch.tensor([0, *(shapes[name][0] for name in names[:-1])]).cumsum(0)
            rows = torch.cat([start + first for start, (first, *_) in zip(starts, indices, strict=True)])
            module = names[0].rpartition(".")[0]
            offset = model.arch.norm_offset if rules[split_name(module)[1]] in NORMS else 0.0
            return CutTensor(stored, [rows, *indices[0][1:]], self.selection.factors.get(module, 1.0), offset)

        with errors_on_all_ranks(parameters.values()):
            load_weights(parameters, folder, FAMILIES[model.arch.family], self.selection.layers, cut)
