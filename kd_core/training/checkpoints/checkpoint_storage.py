"""DCP storage of a checkpoint's tensors as safetensors files, one per rank.

    tensors_00000.safetensors    header: name → dtype, shape, bytes, and "offsets": name → position in the whole tensor

The files hold numbers and no pickle, so reading them runs no code. DCP plans which rank writes and reads which chunk
of a tensor, resharding included. This module only writes and reads the files. safetensors refuses a header whose
shapes need more bytes than the file has, so the file bounds what is allocated. DCP's own `HuggingFaceStorageWriter`
would hold two more copies of a rank's tensors in memory while it writes.
"""

import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from kd_core.errors import UsageError
from kd_core.files import MAX_TEXT_BYTES, damage_as_usage_error, is_plain_file
from kd_core.json_fields import check_integer, check_list, check_object
from kd_core.training.checkpoints.checkpoint_files import TENSORS

OFFSETS = "offsets"
EARLIER_METADATA = ".metadata"  # the pickle of an earlier format
ALIGNMENT = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_file(folder: Path, rank: int) -> Path:
    """Returns the path of the file that a rank writes."""
    return folder / f"tensors_{rank:05d}.safetensors"


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class TensorWriter(StorageWriter):
    """Writer of the chunks that DCP plans for this rank, one tensor at a time."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = tensor_file(folder, rank)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing, because the folder is fixed."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing, because the folder exists."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Sorts chunks by the size of their elements, largest first, so that each is aligned to its dtype."""
        return replace(plan, items=sorted(plan.items, key=lambda item: -_properties(item).dtype.itemsize))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file and flushes it to the disk."""
        with self.path.open("wb") as file:
            file.write(_header(plan.items))
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                flat = tensor.detach().cpu().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        return _done([WriteResult(item.index, item.tensor_storage_size() or 0, self.path.name) for item in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Does nothing, because the headers hold all that reading needs."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns False, so that DCP never chooses this class by a path. It is always passed explicitly."""
        del checkpoint_id
        return False


def _properties(item: WriteItem) -> TensorProperties:
    assert item.tensor_data is not None, "a checkpoint holds tensors alone"
    return item.tensor_data.properties


def _header(plan_items: list[WriteItem]) -> bytes:
    """Returns a safetensors header: the length of its JSON, and the JSON itself."""
    header: dict[str, Any] = {}
    offsets: dict[str, list[int]] = {}
    end = 0
    for item in plan_items:
        assert item.tensor_data is not None
        name, chunk, dtype = item.index.fqn, item.tensor_data.chunk, item.tensor_data.properties.dtype
        assert name not in header, f"a rank holds two parts of {name}"
        # Chunks follow each other without gaps.
        start, end = end, end + math.prod(chunk.sizes) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(chunk.sizes), "data_offsets": [start, end]}
        offsets[name] = list(chunk.offsets)
    text = json.dumps({"__metadata__": {OFFSETS: json.dumps(offsets)}, **header}).encode()
    # Spaces behind the JSON align the first tensor.
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def read_metadata(folder: Path) -> Metadata:
    """Reads the headers of a checkpoint: sizes, dtypes and chunks of all tensors, and the file of each chunk.

    Raises:
        UsageError: the format is an earlier one, a file is damaged, or chunks do not make up a tensor.
    """
    paths = sorted(folder.glob(TENSORS))
    if not paths:
        problem = (
            f"holds {EARLIER_METADATA}, a pickle of an earlier version, which is never read"
            if (folder / EARLIER_METADATA).exists()
            else "holds no tensors_*.safetensors"
        )
        raise UsageError(f"{folder}: {problem}. Wanted a checkpoint of this version: train again, or take another one.")
    chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
    files: dict[MetadataIndex, Path] = {}
    for path in paths:
        for name, dtype, chunk in _chunks(path):
            dtypes[name].add(dtype)
            chunks[name].append(chunk)
            files[MetadataIndex(name, chunk.offsets)] = path
    tensors: dict[str, Any] = {}
    for name, tensor_chunks in chunks.items():
        if len(dtypes[name]) > 1:
            raise UsageError(f"{folder}: {name!a} has parts of several dtypes. Use another checkpoint.")
        size = _size_of_grid(tensor_chunks)
        if size is None:
            raise UsageError(f"{folder}: the parts of {name!a} overlap, or leave a gap. Use another checkpoint.")
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=min(dtypes[name], key=str)), size, tensor_chunks)
    return Metadata(tensors, storage_data=files)


def _chunks(path: Path) -> Iterator[tuple[str, torch.dtype, ChunkStorageMetadata]]:
    """Yields the name, dtype and chunk of each tensor in a file, from its header alone.

    Raises:
        UsageError: the path is no plain file, or its header is damaged.
    """
    if not is_plain_file(path):
        raise UsageError(f"{path}: is not a file. Use another checkpoint.")
    with (
        damage_as_usage_error(path, "the tensors of a checkpoint", "Take another checkpoint"),
        safe_open(path, "pt") as file,
    ):
        text = (file.metadata() or {}).get(OFFSETS, "null")
        if len(text) > MAX_TEXT_BYTES:
            raise ValueError(f"{OFFSETS} of {len(text)} characters")
        offsets = check_object(json.loads(text), OFFSETS, file.keys())
        for name in file.keys():  # noqa: SIM118 (no dictionary)
            stored = file.get_slice(name)
            shape, kind = stored.get_shape(), stored.get_dtype()
            if kind not in DTYPES:
                raise ValueError(f"{name!a} is of dtype {kind}; wanted one of {', '.join(DTYPES)}")
            starts = [check_integer(start, OFFSETS, 0, 1 << 48) for start in check_list(offsets[name], OFFSETS)]
            if len(starts) != len(shape):
                raise ValueError(f"{name!a} has {len(starts)} offsets for {len(shape)} dimensions")
            yield name, DTYPES[kind], ChunkStorageMetadata(torch.Size(starts), torch.Size(shape))


def _size_of_grid(chunks: list[ChunkStorageMetadata]) -> torch.Size | None:
    """Returns the size of the tensor that chunks make up, or None if they overlap or leave a gap.

    Every layout of ranks cuts a tensor by a grid: each dimension at the same places for all chunks.
    """
    # Chunks without elements cover nothing. If all are empty, one of them has the size.
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)] or chunks[:1]
    size: list[int] = []
    cuts: list[dict[int, int]] = []  # for each dimension: the end of a chunk by its start
    for dimension in range(len(filled[0].sizes)):
        ends = {chunk.offsets[dimension]: chunk.offsets[dimension] + chunk.sizes[dimension] for chunk in filled}
        cuts.append(ends)
        size.append(max(ends.values()))
        if sorted(ends) != sorted([0, *ends.values()])[:-1]:  # each chunk begins where the one before ends
            return None
    # The grid has one chunk for each of its cells.
    is_complete = len({tuple(chunk.offsets) for chunk in filled}) == len(filled) == math.prod(map(len, cuts))
    # Each chunk ends at the cuts of the grid.
    is_aligned = all(
        cut[start] == start + length
        for chunk in filled
        for cut, start, length in zip(cuts, chunk.offsets, chunk.sizes, strict=True)
    )
    return torch.Size(size) if is_complete and is_aligned else None


class TensorReader(StorageReader):
    """Reader of the chunks that DCP plans for this rank, from the files of all ranks.

    Its constructor reads the headers, and raises as `read_metadata` does.
    """

    def __init__(self, folder: Path) -> None:
        self.metadata = read_metadata(folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing, because the folder is fixed."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the content of the headers."""
        del args, kwargs
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing, because the headers are read already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies stored chunks into this rank's tensors, one file at a time."""
        by_file: dict[Path, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.metadata.storage_data[item.storage_index]].append(item)
        for path, reads in by_file.items():
            with safe_open(path, "pt") as file:
                for item in reads:
                    target = planner.resolve_tensor(item)
                    target.detach().copy_(_read(file, item))
                    planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns False, so that DCP never chooses this class by a path. It is always passed explicitly."""
        del checkpoint_id
        return False


def _read(file: Any, item: ReadItem) -> Tensor:
    """Reads the part of a stored chunk that an item asks for."""
    box = tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))
    name = item.storage_index.fqn
    return file.get_slice(name)[box] if box and math.prod(item.lengths) else file.get_tensor(name)[box]
