"""Where a student comes from: a folder, a folder with layers dropped, or random numbers."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from kd_core.errors import UsageError
from kd_core.students.decoder import Architecture, Decoder
from kd_core.students.families import read_architecture
from kd_core.students.weights import empty_decoder, load_weights


@runtime_checkable
class Start(Protocol):
    """Anything that names an architecture and gives a decoder with its first weights."""

    @property
    def folder(self) -> str:
        """The Hugging Face folder whose tokenizer the student keeps."""
        ...

    def architecture(self) -> Architecture:
        """The student's shape; reads `config.json` alone."""
        ...

    def build(self, device: torch.device, seed: int) -> Decoder:
        """The student with its first weights, float32, on `device`."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """A student from a Hugging Face folder, whole or with only `keep_layers` of its layers, in that order.

    `vocab_size` is the real vocabulary, where the folder's weights are padded beyond it (its config does not say).
    """

    folder: str
    keep_layers: tuple[int, ...] | None = None
    vocab_size: int | None = None

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
        stored = read_architecture(Path(self.folder))
        arch = replace(stored, num_layers=len(self._kept(stored)))
        if self.vocab_size is None:
            return arch
        if not 0 < self.vocab_size <= stored.vocab_size:
            raise UsageError(
                f"student.vocab_size: got {self.vocab_size}; wanted 1 to the {stored.vocab_size} rows of {self.folder}."
            )
        return replace(arch, vocab_size=self.vocab_size, padded_vocab_size=stored.vocab_size)

    def build(self, device: torch.device, seed: int) -> Decoder:
        """Load the kept layers; `seed` is not used, for nothing is random."""
        del seed
        stored = read_architecture(Path(self.folder))
        model = empty_decoder(self.architecture(), device)
        load_weights(model, Path(self.folder), self._kept(stored))
        return model


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

    def architecture(self) -> Architecture:
        """The folder's architecture with our sizes."""
        return replace(
            read_architecture(Path(self.folder)),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
        )

    def build(self, device: torch.device, seed: int) -> Decoder:
        """Normal weights, each parameter from a generator seeded by (seed, name), so no layout changes them."""
        model = empty_decoder(self.architecture(), device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.fill_(1.0)
                    continue
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, self.init_std, generator=generator))
        return model
