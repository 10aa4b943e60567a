"""Weights of Hugging Face folders (safetensors, one file or several). Each process reads only its own part."""

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
from kd_core.files import damage_as_usage_error, is_plain_file, read_json
from kd_core.json_fields import check_object
from kd_core.sharded_values import Box, fill_expert_rows, fill_sharded
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.families.family import Family, Rows
from kd_core.students.families.registry import FAMILIES
from kd_core.students.huggingface.config_json import read_architecture

LAYER = re.compile(r"\d{1,9}")
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REFETCH_HINT = "Fetch the folder again"
IGNORED = ".rotary_emb.inv_freq"  # a buffer in older files, which follows from config.json


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
COMPARED_ROWS = 4096


def _index_files(index: Path) -> list[str]:
    """Returns the names of the files in an index."""
    with damage_as_usage_error(index, "a safetensors index", REFETCH_HINT):
        names = sorted(set(check_object(read_json(index, "a safetensors index")["weight_map"], "weight_map").values()))
        if foreign := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ValueError(f"names {foreign[0]!a}, which is not a plain name of a .safetensors file")
    return names


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers loads, in a stable order.

    They are the single file, or if there is none, those of the index. An index beside a single file is not read.

    Raises:
        UsageError: there are none, a file of the index is missing, or the folder also holds an adapter.
    """
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"{folder}: holds adapter_config.json beside a model, where transformers loads the adapter on its own "
            "base. Wanted a merged model, or the adapter in a folder of its own (student.adapter)."
        )
    is_single = is_plain_file(folder / SINGLE) or not (folder / INDEX).exists()
    files = [folder / name for name in ([SINGLE] if is_single else _index_files(folder / INDEX))]
    missing = [str(file) for file in files if not is_plain_file(file)]
    if missing:
        pickled = " Weights as .bin are not read: save them as safetensors." if [*folder.glob("*.bin")] else ""
        raise UsageError(f"{missing[0]}: no such file; wanted the weights of a Hugging Face folder.{pickled}")
    return files


def check_weight_count(parameters: Iterable[Tensor], folder: Path) -> None:
    """Checks that a model has no more numbers than the folder has bytes of weights, before memory is allocated.

    A folder without weights passes. A dry run needs none, and filling the model reports that they are missing.

    Raises:
        UsageError: `config.json` describes more weights than there are bytes.
    """
    numbers = sum(parameter.numel() for parameter in parameters)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors") if is_plain_file(path))
    if stored and numbers > stored:
        raise UsageError(
            f"{folder}: config.json describes {numbers} weights, but the safetensors files have {stored} bytes. "
            f"{REFETCH_HINT}."
        )


class StoredTensor:
    """A tensor in a safetensors file. Any box of it can be read alone."""

    def __init__(self, file: Any, path: Path, name: str) -> None:
        self.path, self.name, self.slice = path, name, file.get_slice(name)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.slice.get_shape())

    def read(self, box: Box) -> Tensor:
        """Returns the values of a box.

        Raises:
            UsageError: they are not finite, or of an unsupported type.
        """
        # A rank may hold nothing of a small tensor: an empty tensor of the stored type.
        if any(part.start >= part.stop for part in box):
            return self.slice[:0].new_empty([part.stop - part.start for part in box])
        values: Tensor = self.slice[box]
        if values.dtype not in READABLE:
            raise UsageError(f"{self.path}: {self.name!a} is of {values.dtype}; wanted floats of 16 bits or more.")
        if not values.isfinite().all():
            raise UsageError(f"{self.path}: {self.name} holds NaN or infinite values. Fetch the folder again.")
        return values

    def fill(self, *parameters: Tensor) -> None:
        """Copies the tensor into parameters, in any layout, which have its rows one after the other.

        Raises:
            UsageError: the tensor has another shape, or values that are not finite.
        """
        wanted_shape = (sum(len(parameter) for parameter in parameters), *parameters[0].shape[1:])
        if self.shape != wanted_shape:
            raise UsageError(f"{self.path}: found {self.name} of shape {self.shape}; wanted shape {wanted_shape}.")
        first_row = 0
        for parameter in parameters:
            fill_sharded(parameter, functools.partial(self._read_from_row, first_row))
            first_row += len(parameter)

    def fill_rows(self, parameter: Tensor, place: Rows) -> None:
        """Copies the tensor into some rows of one expert's matrix, on the ranks that hold some of them.

        Raises:
            UsageError: the tensor has another shape, or values that are not finite.
        """
        height, width = parameter.shape[1] // place.parts, parameter.shape[2]
        if self.shape != (height, width):
            raise UsageError(f"{self.path}: found {self.name} of shape {self.shape}; wanted shape {(height, width)}.")
        fill_expert_rows(parameter, place.expert, slice(place.part * height, (place.part + 1) * height), self.read)

    def _read_from_row(self, first_row: int, box: Box) -> Tensor:
        rows, *rest = box
        return self.read((slice(rows.start + first_row, rows.stop + first_row), *rest))


def _open_tensors(path: Path, stack: ExitStack) -> Iterator[StoredTensor]:
    """Yields the tensors of a safetensors file. They can be read until `stack` is closed."""
    try:
        file = stack.enter_context(safe_open(path, "pt"))
        for name in sorted(file.keys()):
            yield StoredTensor(file, path, name)
    except (SafetensorError, OverflowError, UnicodeError) as error:
        raise UsageError(f"{path}: damaged weights ({error}). Fetch or export the folder again.") from None


def stored_tensors(files: list[Path]) -> Iterator[StoredTensor]:
    """Yields all tensors of safetensors files. A tensor must be read before the next file begins.

    Raises:
        UsageError: a file is damaged.
    """
    for path in files:
        with ExitStack() as stack:
            yield from _open_tensors(path, stack)


def _new_name(stored: str, family: Family, position_of: Mapping[int, int]) -> str | None:
    """Returns the student's name for a stored tensor, or None if its layer was dropped or it is no part of the student.

    `position_of` maps layers of the folder to layers of the student.
    """
    name = family.name_in_student(stored)
    if name is None or not name.startswith("layers."):
        return name
    _, layer, rest = f"{name}..".split(".", 2)
    if not LAYER.fullmatch(layer):
        return name
    return f"layers.{position_of[int(layer)]}.{rest[:-2]}" if int(layer) in position_of else None


@functools.lru_cache(maxsize=16)
def _differ(files: tuple[tuple[Path, int, int], ...], family: Family) -> bool:
    """Checks whether both an embedding and an lm_head are stored, with different values.

    `files` are paths with sizes and times, so that a changed file is read again in spite of the cache.
    """
    with ExitStack() as stack:
        by_name: dict[str | None, StoredTensor] = {}
        for path, _, _ in files:
            for stored in _open_tensors(path, stack):
                by_name[family.name_in_student(stored.name)] = stored
        embedding, head = by_name.get(EMBEDDING), by_name.get(HEAD)
        if embedding is None or head is None:
            return False
        if embedding.shape != head.shape:
            return True
        rows, width = embedding.shape
        # Compare some rows at a time, which bounds memory.  [COMPARED_ROWS, D]
        boxes = [(slice(row, min(row + COMPARED_ROWS, rows)), slice(0, width)) for row in range(0, rows, COMPARED_ROWS)]
        return any(not torch.equal(embedding.read(box).float(), head.read(box).float()) for box in boxes)


def has_own_head(folder: Path, family: Family) -> bool:
    """Checks whether the folder has an lm_head that differs from its embedding.

    transformers does not tie such a pair, whatever `config.json` states. Without weights the result is False.
    """
    if not any(is_plain_file(folder / name) for name in (SINGLE, INDEX)):
        return False
    facts = ((path, path.stat()) for path in weight_files(folder))
    return _differ(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in facts), family)


def _rows_by_name(parameters: Mapping[str, Tensor], family: Family) -> dict[str, Rows]:
    """Returns the stored tensors that hold rows of an expert's matrix, by name."""
    rows: dict[str, Rows] = {}
    for name, parameter in parameters.items():
        rows |= family.rows_of_experts(name, len(parameter))
    return rows


def load_weights(parameters: Mapping[str, Tensor], folder: Path, family: Family, keep_layers: tuple[int, ...]) -> None:
    """Copies the folder's weights into `parameters` by name. Layer i of them is the folder's layer `keep_layers[i]`.

    A tied student takes the stored embedding, or if there is none, the stored lm_head.

    Raises:
        UsageError: a tensor is missing, unknown, of another shape, or not finite.
    """
    position_of = {stored: new for new, stored in enumerate(keep_layers)}
    files, stacked = weight_files(folder), _rows_by_name(parameters, family)
    remaining = {name: p for name, p in parameters.items() if name not in {rows.parameter for rows in stacked.values()}}
    tied = HEAD not in parameters
    only_head_stored = tied and EMBEDDING not in {
        _new_name(stored.name, family, position_of) for stored in stored_tensors(files)
    }
    for stored in stored_tensors(files):
        name = _new_name(stored.name, family, position_of)
        if name == HEAD and only_head_stored:
            name = EMBEDDING
        if name is None or name.endswith(IGNORED) or (name == HEAD and tied):
            continue
        if rows := stacked.pop(name, None):
            stored.fill_rows(parameters[rows.parameter], rows)
            continue
        names = family.names_of_parts(name)
        if not remaining.keys() >= set(names):
            raise UsageError(f"{folder}: found {stored.name!a} of shape {stored.shape}; wanted no such tensor.")
        stored.fill(*(remaining.pop(name) for name in names))
    if missing := [*remaining, *stacked]:
        raise UsageError(f"{folder}: {len(missing)} tensors are missing, the first is {min(missing)}.")


def stored_architecture(folder: Path) -> Architecture:
    """Returns the architecture of a folder's weights, which is untied if the stored lm_head is not the embedding."""
    arch = read_architecture(folder)
    return (
        replace(arch, tie_embeddings=False)
        if arch.tie_embeddings and has_own_head(folder, FAMILIES[arch.family])
        else arch
    )
