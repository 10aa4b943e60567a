"""A start from some layers, channels and attention heads of a Hugging Face folder (`width_selection.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.hub import resolve_folder
from kd_core.sharded_values import Box, errors_on_all_ranks
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import meta_decoder
from kd_core.students.decoder.lora_layers import base_parameters
from kd_core.students.huggingface.weights import StoredTensor, load_weights
from kd_core.students.student import ShardingRule, Student
from kd_core.students.width_importance import inside_block
from kd_core.students.width_selection import KeptWidth


class CutTensor(StoredTensor):
    """The kept rows and columns of a stored tensor, times a factor."""

    def __init__(self, stored: StoredTensor, indices: tuple[Tensor | None, ...], factor: float) -> None:
        self.path, self.name, self.slice = stored.path, stored.name, stored.slice
        self.stored, self.factor = stored, factor
        # All of a dimension that is not cut.
        sizes = zip(indices, stored.shape, strict=False)
        self.indices = [torch.arange(size) if index is None else index for index, size in sizes]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.indices))

    def read(self, box: Box) -> Tensor:
        """Returns the values of a box of the kept rows and columns. Reads the rows between its first and last one."""
        indices = [index[part] for index, part in zip(self.indices, box, strict=True)]
        if any(len(index) == 0 for index in indices):
            return self.slice[:0].new_empty([len(index) for index in indices])
        values = self.stored.read(tuple(slice(int(index[0]), int(index[-1]) + 1) for index in indices))
        for dimension, index in enumerate(indices):
            values = values.index_select(dimension, index - index[0])
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
        return meta_decoder(self.kept.arch)

    def fill(self, model: Student, seed: int) -> None:
        """Loads the kept layers, channels and heads of the folder. A process reads a tensor at a time."""
        del seed  # nothing is random
        parameters, rules = base_parameters(model), model.sharding_rules()

        def part_of(name: str, stored: StoredTensor) -> StoredTensor:
            return CutTensor(stored, self._indices(name, rules), self.kept.gains.get(self._stored_module(name), 1.0))

        with errors_on_all_ranks(parameters.values()):
            load_weights(parameters, resolve_folder(self.folder), self.kept.layers, part_of)

    def _stored_module(self, name: str) -> str:
        """Returns the name that a parameter's module has in the folder."""
        module = name.rpartition(".")[0]
        inner = inside_block(module)
        return module if inner == module else f"layers.{self.kept.layers[int(name.split('.')[1])]}.{inner}"

    def _indices(self, name: str, rules: Mapping[str, ShardingRule]) -> tuple[Tensor | None, ...]:
        """Returns the indices that stay in each dimension of a parameter. None: all of them."""
        module, _, kind = name.rpartition(".")
        inner, hidden = inside_block(module), self.kept.hidden
        rule = rules[inner]
        if rule in ("embedding", "lm_head"):
            return None, hidden
        if rule in ("norm", "head_norm"):
            return (hidden if rule == "norm" else None,)
        # Linear layers of a block map hidden channels to channels inside attention or feed-forward, or back.
        inside = self._inside(inner, rule, int(name.split(".")[1]))
        outputs, inputs = (hidden, inside) if rule == "rows" else (inside, hidden)
        return (outputs, inputs) if kind == "weight" else (outputs,)

    def _inside(self, inner: str, rule: ShardingRule, layer: int) -> Tensor:
        if inner.startswith("mlp."):
            return self.kept.feed_forward[layer]
        heads = self.kept.kv_heads if rule == "kv_columns" else self.kept.heads
        return _channels(heads[layer], self.kept.arch.head_dim)
