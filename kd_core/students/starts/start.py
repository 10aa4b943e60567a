"""Starts of a student: a Hugging Face folder, whole or with fewer layers, or random weights.

A start makes a student in two steps, so that it can be parallelised between them:

    decoder(): names and shapes on the meta device → parallelize.py: sharded memory → fill(): values in place
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.hub import resolve_folder
from kd_core.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, check_settings
from kd_core.sharded_values import errors_on_all_ranks, fill_sharded
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.lora_layers import base_parameters
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.families.registry import FAMILIES, family_decoder
from kd_core.students.huggingface.config_json import read_architecture
from kd_core.students.huggingface.weights import check_weight_count, load_weights, stored_architecture
from kd_core.students.student import Student, allocate


@runtime_checkable
class StudentInit(Protocol):
    """A source of students: an architecture, and first weights for a decoder of it."""

    @property
    def folder(self) -> str:
        """Returns the Hugging Face folder, or `hub:OWNER/NAME`, whose tokenizer the student keeps."""
        ...

    def architecture(self) -> Architecture:
        """Returns the student's architecture."""
        ...

    def build_on_meta(self) -> Student:
        """Returns the student on the meta device, with its adapters, and without `requires_grad` where it is frozen."""
        ...

    def fill(self, model: Student, seed: int) -> None:
        """Writes the first weights in place, in any layout. Every process calls it, and writes its own part."""
        ...


def meta_student(start: StudentInit, tokens: int | None) -> Student:
    """Returns the start's decoder on the meta device, with a real vocabulary of `tokens` (None: that of the start)."""
    model = start.build_on_meta()
    if tokens is not None:
        model.arch = model.arch.with_tokens(tokens, start.folder)
    return model


def build_student(
    start: StudentInit,
    device: torch.device,
    seed: int,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Student:
    """Returns the student of `meta_student` with its first weights, in `dtype`, whole on `device` in one process."""
    model = allocate(meta_student(start, tokens), device, dtype)
    start.fill(model, seed)
    model.check_start()
    return model


def fill_random(parameter: Tensor, name: str, seed: int, draw: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    """Fills a parameter with random values from a generator seeded by (seed, name).

    Every process draws the whole tensor and takes its part, so the values are the same in every layout.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    values = draw(torch.empty(parameter.shape), generator)
    fill_sharded(parameter, lambda box: values[box])


@dataclass(frozen=True)
class Pretrained:
    """A student from a Hugging Face folder, whole or with fewer layers.

    Args:
        folder: the folder, `hub:OWNER/NAME`, or `hub:OWNER/NAME@REVISION`.
        keep_layers: the layers of the folder that the student has, in this order. None: all.
            `python -m launchers.importance` measures which layers matter.
        vocab_size: the real vocabulary, if it differs from the tokenizer's. Rows of the weights beyond it are padding.
    """

    folder: str
    keep_layers: tuple[int, ...] | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_settings(self, "student.", keep_layers=AT_LEAST_0, vocab_size=AT_LEAST_1)

    def _layers(self, stored: Architecture) -> tuple[int, ...]:
        layers = tuple(range(stored.num_layers)) if self.keep_layers is None else self.keep_layers
        if not layers or min(layers) < 0 or max(layers) >= stored.num_layers or len(set(layers)) != len(layers):
            raise UsageError(
                f"student.keep_layers: got {layers}; wanted different layers of 0 to {stored.num_layers - 1}, "
                f"for {self.folder} has {stored.num_layers} layers."
            )
        return layers

    def architecture(self) -> Architecture:
        """Returns the folder's architecture with the kept layers and the set vocabulary."""
        stored = stored_architecture(resolve_folder(self.folder))
        arch = stored.with_layers(self._layers(stored))
        if self.vocab_size is None:
            return arch
        if not 0 < self.vocab_size <= stored.vocab_size:
            raise UsageError(
                f"student.vocab_size: got {self.vocab_size}; wanted 1 to the {stored.vocab_size} rows of {self.folder}."
            )
        return replace(arch, vocab_size=self.vocab_size, padded_vocab_size=stored.vocab_size)

    def build_on_meta(self) -> Student:
        model = family_decoder(self.architecture())
        check_weight_count(model.parameters(), resolve_folder(self.folder))
        return model

    def fill(self, model: Student, seed: int) -> None:
        """Loads the kept layers of the folder."""
        del seed  # nothing is random
        parameters = base_parameters(model)
        with errors_on_all_ranks(parameters.values()):
            layers = self._layers(read_architecture(resolve_folder(self.folder)))
            load_weights(parameters, resolve_folder(self.folder), FAMILIES[model.arch.family], layers)


@dataclass(frozen=True)
class Random:
    """A student of random weights in a shape of its own, with the vocabulary and tokenizer of `folder`.

    Weights are normal with a standard deviation of `init_std`. Experts have `intermediate_size` channels as well.
    """

    folder: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        check_settings(self, "student.", **dict.fromkeys(sizes, AT_LEAST_1), init_std=ABOVE_0)
        for name, total in (("num_heads", "hidden_size"), ("num_kv_heads", "num_heads")):
            if getattr(self, total) % getattr(self, name):
                raise UsageError(
                    f"student.{name}: got {getattr(self, name)}; wanted a divisor of {total} {getattr(self, total)}."
                )
        if self.hidden_size // self.num_heads % 2:
            raise UsageError(
                f"student.num_heads: got {self.num_heads}; wanted heads of an even size, for their angles."
            )

    def architecture(self) -> Architecture:
        """Returns the folder's architecture with the sizes of this start. Windows of its layers repeat in turn."""
        stored = read_architecture(resolve_folder(self.folder))
        layers = tuple(layer % stored.num_layers for layer in range(self.num_layers))
        # Experts that have a size beside that of dense layers get this one too.
        experts = stored.experts
        if experts is not None and experts.size is not None:
            experts = replace(experts, size=self.intermediate_size)
        return replace(
            stored.with_layers(layers),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            experts=experts,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
        )

    def build_on_meta(self) -> Student:
        return family_decoder(self.architecture())

    def fill(self, model: Student, seed: int) -> None:
        """Draws normal weights, each parameter by (seed, name), and sets norms to a factor of 1 and biases to 0."""

        def normal(values: Tensor, generator: torch.Generator) -> Tensor:
            return values.normal_(0.0, self.init_std, generator=generator)

        norms = {f"{name}.weight": 1.0 - m.offset for name, m in model.named_modules() if isinstance(m, RMSNorm)}
        for name, parameter in base_parameters(model).items():
            if name in norms or name.endswith("bias"):
                with torch.no_grad():
                    parameter.fill_(norms.get(name, 0.0))
            else:
                fill_random(parameter, name, seed, normal)
