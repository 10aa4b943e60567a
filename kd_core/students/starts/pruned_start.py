"""A start from some layers, channels and attention heads of a Hugging Face folder (`width_selection.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.hub import resolve_folder
from kd_core.sharded_values import Box, errors_on_all_ranks
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.lora_layers import base_parameters
from kd_core.students.families.registry import FAMILIES, family_decoder
from kd_core.students.huggingface.weights import StoredTensor, load_weights, stored_architecture
from kd_core.students.student import ShardingRule, Student
from kd_core.students.width_importance import inside_block
from kd_core.students.width_selection import KeptWidth


class CutTensor(StoredTensor):
    """Some rows and columns of a stored tensor, by increasing indices for each dimension, times a factor."""

    def __init__(self, stored: StoredTensor, indices: list[Tensor], factor: float) -> None:
        self.path, self.name, self.slice = stored.path, stored.name, stored.slice
        self.stored, self.indices, self.factor = stored, indices, factor

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
        return values if self.factor == 1 else values.float() * self.factor


def _channels(heads: Tensor, head_dim: int) -> Tensor:
    """Returns the channels of attention heads.  [H] → [H·d]"""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


@dataclass(frozen=True)
class PrunedStart:
    """A student of some layers and widths of a Hugging Face folder."""

    folder: str
    kept: KeptWidth

    def architecture(self) -> Architecture:
        return self.kept.arch

    def build_on_meta(self) -> Student:
        return family_decoder(self.kept.arch)

    def fill(self, model: Student, seed: int) -> None:
        """Loads the kept layers, channels and heads of the folder, a tensor at a time."""
        del seed  # nothing is random
        folder, parameters, rules = resolve_folder(self.folder), base_parameters(model), model.sharding_rules()
        stored_model = family_decoder(stored_architecture(folder).with_layers(self.kept.layers))
        shapes = {name: tuple(parameter.shape) for name, parameter in stored_model.named_parameters()}

        def cut(stored: StoredTensor, names: list[str]) -> StoredTensor:
            kept = [self._indices(name, shapes[name], rules) for name in names]
            # Parameters that are joined in the folder follow each other in its rows, so each begins where the last
            # one of the model ends.
            starts = torch.tensor([0, *(shapes[name][0] for name in names[:-1])]).cumsum(0)
            rows = torch.cat([start + indices[0] for start, indices in zip(starts, kept, strict=True)])
            return CutTensor(stored, [rows, *kept[0][1:]], self.kept.gains.get(self._stored_module(names[0]), 1.0))

        with errors_on_all_ranks(parameters.values()):
            load_weights(parameters, folder, FAMILIES[model.arch.family], self.kept.layers, cut)

    def _stored_module(self, name: str) -> str:
        """Returns the name of a parameter's module in the folder, whose layers are numbered otherwise."""
        module = name.rpartition(".")[0]
        inner = inside_block(module)
        return module if inner == module else f"layers.{self.kept.layers[int(name.split('.')[1])]}.{inner}"

    def _indices(self, name: str, shape: tuple[int, ...], rules: Mapping[str, ShardingRule]) -> list[Tensor]:
        """Returns the indices that stay in each dimension of a parameter, whose shape in the folder is given."""
        module, _, kind = name.rpartition(".")
        inner, hidden = inside_block(module), self.kept.hidden
        rule = rules[inner]
        if rule in ("embedding", "lm_head"):
            return [torch.arange(shape[0]), hidden]
        if rule in ("norm", "head_norm"):
            return [hidden if rule == "norm" else torch.arange(shape[0])]
        # Linear layers of a block map hidden channels to channels inside attention or feed-forward, or back.
        inside = self._inside(inner, rule, int(name.split(".")[1]))
        outputs, inputs = (hidden, inside) if rule == "rows" else (inside, hidden)
        return [outputs, inputs] if kind == "weight" else [outputs]

    def _inside(self, inner: str, rule: ShardingRule, layer: int) -> Tensor:
        if inner.startswith("mlp."):
            return self.kept.feed_forward[layer]
        heads = self.kept.kv_heads if rule == "kv_columns" else self.kept.heads
        return _channels(heads[layer], self.kept.arch.head_dim)
