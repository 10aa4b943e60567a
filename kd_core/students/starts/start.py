"""Where a student comes from: a folder, whole or fewer of its layers, or random numbers.

A start makes a student in two steps, so that it can be spread over processes between them: `decoder` gives names and
shapes without memory, `fill` writes the first values in place.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.hub import folder_of
from kd_core.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, check_ranges
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder, materialised, meta_decoder
from kd_core.students.decoder.lora_layers import base_parameters
from kd_core.students.decoder.sharded_values import put, stopping_together
from kd_core.students.huggingface.config_json import read_architecture
from kd_core.students.huggingface.weights import check_room, load_weights, stored_architecture


@runtime_checkable
class Start(Protocol):
    """Anything that names an architecture and gives a decoder its first weights."""

    @property
    def folder(self) -> str:
        """The Hugging Face folder, or `hub:OWNER/NAME`, whose tokenizer the student keeps."""
        ...

    def architecture(self) -> Architecture:
        """The student's shape; reads `config.json` alone."""
        ...

    def decoder(self) -> Decoder:
        """The student on the meta device, with its adapters, and with `requires_grad` off where it is frozen."""
        ...

    def fill(self, model: Decoder, seed: int) -> None:
        """Write the first weights in place, whatever the layout; every process calls it, and writes its own part."""
        ...


def decoder_of(start: Start, tokens: int | None) -> Decoder:
    """Returns the start's decoder on the meta device. Of its rows, `tokens` are real (None: as the start says)."""
    model = start.decoder()
    if tokens is not None:
        model.arch = model.arch.with_tokens(tokens, start.folder)
    return model


def build(start: Start, device: torch.device, seed: int, tokens: int | None = None) -> Decoder:
    """The student of `decoder_of` with its first weights, float32, whole on `device`, by one process."""
    model = materialised(decoder_of(start, tokens), device)
    start.fill(model, seed)
    return model


def fill_random(parameter: Tensor, name: str, seed: int, draw: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    """Fill a parameter from a generator seeded by (seed, name): drawn whole, so that no layout changes the numbers."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    values = draw(torch.empty(parameter.shape), generator)
    put(parameter, lambda box: values[box])


@dataclass(frozen=True)
class Pretrained:
    """A student from a Hugging Face folder, whole or with only `keep_layers` of its layers, in that order.

    `folder` may be `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION`. Which layers to keep is measured by
    `python -m launchers.importance`. `vocab_size` is the real vocabulary, where it is not the tokenizer's; rows of
    the folder's weights beyond it are padding.
    """

    folder: str
    keep_layers: tuple[int, ...] | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "student.", keep_layers=AT_LEAST_0, vocab_size=AT_LEAST_1)

    def _kept(self, stored: Architecture) -> tuple[int, ...]:
        kept = tuple(range(stored.num_layers)) if self.keep_layers is None else self.keep_layers
        if not kept or min(kept) < 0 or max(kept) >= stored.num_layers or len(set(kept)) != len(kept):
            raise UsageError(
                f"student.keep_layers: got {kept}; wanted different layers of 0 to {stored.num_layers - 1}, "
                f"for {self.folder} has {stored.num_layers} layers."
            )
        return kept

    def architecture(self) -> Architecture:
        """The folder's architecture with as many layers as are kept."""
        stored = stored_architecture(folder_of(self.folder))
        arch = stored.with_layers(self._kept(stored))
        if self.vocab_size is None:
            return arch
        if not 0 < self.vocab_size <= stored.vocab_size:
            raise UsageError(
                f"student.vocab_size: got {self.vocab_size}; wanted 1 to the {stored.vocab_size} rows of {self.folder}."
            )
        return replace(arch, vocab_size=self.vocab_size, padded_vocab_size=stored.vocab_size)

    def decoder(self) -> Decoder:
        """See `Start`."""
        model = meta_decoder(self.architecture())
        check_room(model.parameters(), folder_of(self.folder))
        return model

    def fill(self, model: Decoder, seed: int) -> None:
        """Load the kept layers; `seed` is not used, for nothing is random."""
        del seed
        parameters = base_parameters(model)
        with stopping_together(parameters.values()):
            kept = self._kept(read_architecture(folder_of(self.folder)))
            load_weights(parameters, folder_of(self.folder), kept)


@dataclass(frozen=True)
class Random:
    """A student of random weights with the vocabulary and tokenizer of `folder`, in a smaller shape."""

    folder: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        check_ranges(self, "student.", **dict.fromkeys(sizes, AT_LEAST_1), init_std=ABOVE_0)
        for name, of in (("num_heads", "hidden_size"), ("num_kv_heads", "num_heads")):
            if getattr(self, of) % getattr(self, name):
                raise UsageError(
                    f"student.{name}: got {getattr(self, name)}; wanted a divisor of {of} {getattr(self, of)}."
                )
        if self.hidden_size // self.num_heads % 2:
            raise UsageError(
                f"student.num_heads: got {self.num_heads}; wanted heads of an even size, for their angles."
            )

    def architecture(self) -> Architecture:
        """The folder's architecture with our sizes; where its layers see different windows, these go on in turn."""
        stored = read_architecture(folder_of(self.folder))
        turns = tuple(layer % stored.num_layers for layer in range(self.num_layers))
        return replace(
            stored.with_layers(turns),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
        )

    def decoder(self) -> Decoder:
        """See `Start`."""
        return meta_decoder(self.architecture())

    def fill(self, model: Decoder, seed: int) -> None:
        """Normal weights, each parameter from a generator seeded by (seed, name); norms of 1, biases of 0."""

        def normal(values: Tensor, generator: torch.Generator) -> Tensor:
            return values.normal_(0.0, self.init_std, generator=generator)

        parameters = base_parameters(model)
        for name, parameter in parameters.items():
            if name.endswith(("norm.weight", ".bias")):
                with torch.no_grad():
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                fill_random(parameter, name, seed, normal)
