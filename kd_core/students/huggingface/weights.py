"""Weights out of Hugging Face folders (safetensors, one file or sharded), each process only its own part of them."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.files import damaged, is_plain_file, read_json
from kd_core.json_fields import fields
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.sharded_values import Box, put
from kd_core.students.huggingface.config_json import read_architecture

LAYER = re.compile(r"\d{1,9}")
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
THEN = "Fetch the folder again"
IGNORED = ".rotary_emb.inv_freq"  # a buffer that older files carry along; it follows from config.json


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
COMPARED_ROWS = 4096


def _indexed(index: Path) -> list[str]:
    """Names of the files that an index has."""
    with damaged(index, "a safetensors index", THEN):
        names = sorted(set(fields(read_json(index, "a safetensors index")["weight_map"], "weight_map").values()))
        if foreign := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ValueError(f"names {foreign[0]!a}, which is no plain name of a .safetensors file")
    return names


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads, in a stable order; what else lies in the folder is left alone.

    That is the single file, and where there is none those of the index. An index beside a single file is not read.

    Raises:
        UsageError: there are none, the index names one that is missing, or an adapter lies beside them.
    """
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"{folder}: holds adapter_config.json beside a model, where transformers loads the adapter on its own "
            "base. Wanted a merged model, or the adapter in a folder of its own (student.adapter)."
        )
    is_single = is_plain_file(folder / SINGLE) or not (folder / INDEX).exists()
    files = [folder / name for name in ([SINGLE] if is_single else _indexed(folder / INDEX))]
    missing = [str(file) for file in files if not is_plain_file(file)]
    if missing:
        pickled = " Weights as .bin are not read: save them as safetensors." if [*folder.glob("*.bin")] else ""
        raise UsageError(f"{missing[0]}: no such file; wanted the weights of a Hugging Face folder.{pickled}")
    return files


def check_room(parameters: Iterable[Tensor], folder: Path) -> None:
    """Refuse a configuration whose model has more numbers than the folder has bytes of weights, before it has memory.

    A folder without weights passes. A dry run needs none, and whoever fills the model finds that they are missing.

    Raises:
        UsageError: it has.
    """
    numbers = sum(parameter.numel() for parameter in parameters)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors") if is_plain_file(path))
    if stored and numbers > stored:
        raise UsageError(
            f"{folder}: config.json describes {numbers} weights, but the safetensors files have {stored} bytes. {THEN}."
        )


class Stored:
    """A tensor in a safetensors file, of which any box can be read alone."""

    def __init__(self, file: Any, path: Path, name: str) -> None:
        self.path, self.name, self.slice = path, name, file.get_slice(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.slice.get_shape())

    def read(self, box: Box) -> Tensor:
        """The values of a box.

        Raises:
            UsageError: they are not finite.
        """
        if any(part.start >= part.stop for part in box):
            return self.slice[:0].new_empty([part.stop - part.start for part in box])
        values: Tensor = self.slice[box]
        if values.dtype not in READABLE:
            raise UsageError(f"{self.path}: {self.name!a} is of {values.dtype}; wanted floats of 16 bits or more.")
        if not values.isfinite().all():
            raise UsageError(f"{self.path}: {self.name} holds NaN or infinite values. Fetch the folder again.")
        return values

    def fill(self, parameter: Tensor) -> None:
        """Copy it into a parameter of the same shape.

        Raises:
            UsageError: it has another shape, or values that are not finite.
        """
        if self.shape != tuple(parameter.shape):
            raise UsageError(
                f"{self.path}: found {self.name} of shape {self.shape}; wanted shape {tuple(parameter.shape)}."
            )
        put(parameter, self.read)


def _opened(path: Path, stack: ExitStack) -> Iterator[Stored]:
    """The tensors of a safetensors file, which can be read until the stack is closed."""
    try:
        file = stack.enter_context(safe_open(path, "pt"))
        for name in sorted(file.keys()):
            yield Stored(file, path, name)
    except (SafetensorError, OverflowError, UnicodeError) as error:
        raise UsageError(f"{path}: damaged weights ({error}). Fetch or export the folder again.") from None


def stored_tensors(files: list[Path]) -> Iterator[Stored]:
    """All tensors of safetensors files, each to be read before the next.

    Raises:
        UsageError: a file is damaged.
    """
    for path in files:
        with ExitStack() as stack:
            yield from _opened(path, stack)


def _new_name(name: str, position_of: Mapping[int, int]) -> str | None:
    """The student's name of a stored tensor; None where its layer was dropped."""
    name = name.removeprefix("model.")
    if not name.startswith("layers."):
        return name
    _, layer, rest = f"{name}..".split(".", 2)
    if not LAYER.fullmatch(layer):
        return name
    return f"layers.{position_of[int(layer)]}.{rest[:-2]}" if int(layer) in position_of else None


@functools.lru_cache(maxsize=16)
def _are_apart(files: tuple[tuple[Path, int, int], ...]) -> bool:
    """True where an embedding and a head of other values are stored; `files` have sizes and times, for the cache."""
    with ExitStack() as stack:
        ends: dict[str | None, Stored] = {}
        for path, _, _ in files:
            for stored in _opened(path, stack):
                ends[_new_name(stored.name, {})] = stored
        embedding, head = ends.get(EMBEDDING), ends.get(HEAD)
        if embedding is None or head is None:
            return False
        if embedding.shape != head.shape:
            return True
        rows, width = embedding.shape
        boxes = [(slice(at, min(at + COMPARED_ROWS, rows)), slice(0, width)) for at in range(0, rows, COMPARED_ROWS)]
        return any(not torch.equal(embedding.read(box).float(), head.read(box).float()) for box in boxes)


def has_own_head(folder: Path) -> bool:
    """True where the folder has an embedding and another head: transformers ties no such two, whatever config.json has.

    False where there are no weights yet.
    """
    if not any(is_plain_file(folder / name) for name in (SINGLE, INDEX)):
        return False
    facts = ((path, path.stat()) for path in weight_files(folder))
    return _are_apart(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in facts))


def load_weights(parameters: Mapping[str, Tensor], folder: Path, keep_layers: tuple[int, ...]) -> None:
    """Copy the folder's weights into `parameters` by name, whose layer i is the folder's layer `keep_layers[i]`.

    Where the head is the embedding, the embedding is taken if it is stored, else the head.

    Raises:
        UsageError: a tensor is missing, unknown, of another shape, or not finite.
    """
    position_of = {stored: new for new, stored in enumerate(keep_layers)}
    wanted, files = dict(parameters), weight_files(folder)
    tied = HEAD not in parameters
    alone = tied and EMBEDDING not in {_new_name(stored.name, position_of) for stored in stored_tensors(files)}
    for stored in stored_tensors(files):
        name = _new_name(stored.name, position_of)
        if name == HEAD and alone:
            name = EMBEDDING
        if name is None or name.endswith(IGNORED) or (name == HEAD and tied):
            continue
        if name not in wanted:
            raise UsageError(f"{folder}: found {stored.name!a} of shape {stored.shape}; wanted no such tensor.")
        stored.fill(wanted.pop(name))
    if wanted:
        raise UsageError(f"{folder}: {len(wanted)} tensors are missing, the first is {min(wanted)}.")


def stored_architecture(folder: Path) -> Architecture:
    """The architecture of a folder's weights: with a head of its own where one is stored that is not the embedding."""
    arch = read_architecture(folder)
    return replace(arch, tie_embeddings=False) if arch.tie_embeddings and has_own_head(folder) else arch
