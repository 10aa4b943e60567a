"""Export of a student to a Hugging Face folder, with adapters merged, and again in PEFT's format.

If parameters are sharded over processes, all ranks gather one whole tensor at a time, and the first rank writes it.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.files import is_plain_file, new_folder, write_json
from kd_core.precision import DTYPES, Dtype
from kd_core.sharded_values import errors_on_all_ranks, full_expert_rows, full_tensor
from kd_core.students.decoder.lora_layers import adapted_layers, base_parameters
from kd_core.students.families.family import Rows
from kd_core.students.families.registry import FAMILIES
from kd_core.students.huggingface.export_files import ChatFormat, write_export_files
from kd_core.students.huggingface.folder_adapters import folder_adapters
from kd_core.students.huggingface.peft_folder import CONFIG, WEIGHTS, adapter_config, stored_name
from kd_core.students.huggingface.weights import stored_architecture, weight_files
from kd_core.students.student import Student

MAX_FILE_BYTES = 5_000_000_000
ADAPTER = "adapter"


class _Piece(NamedTuple):
    """A tensor to store, with its number of elements. `gather` returns it whole, and all ranks must call it."""

    name: str
    size: int
    gather: Callable[[], Tensor]


class _File(NamedTuple):
    """A file of the folder, and the tensors that it will hold."""

    name: str
    pieces: list[_Piece]


def _unlikely_padding(head: Tensor, real: int) -> Tensor:
    """Returns the rows of lm_head [rows, D], where rows beyond the first `real` become the mean of those.

    Padding rows were not trained. With the mean, a padding logit is the mean of the real logits. exp is convex, so a
    padding token has at most 1/V of the real tokens' probability at any position, and is nowhere the likeliest.
    """
    rows = full_tensor(head)
    # [real, D], then the mean row repeated to [rows − real, D].
    return torch.cat([rows[:real], rows[:real].mean(dim=0, keepdim=True).expand(len(rows) - real, -1)])


def _model_pieces(model: Student) -> list[_Piece]:
    """Returns the tensors by transformers' names, with adapters merged, and without a tied lm_head."""
    arch = model.arch
    gathers = {f"{name}.weight": layer.merged_weight for name, layer in adapted_layers(model).items()}
    if arch.vocab_rows > arch.vocab_size:
        head = "embed_tokens.weight" if arch.tie_embeddings else "lm_head.weight"
        gathers[head] = functools.partial(_unlikely_padding, model.lm_head.weight, arch.vocab_size)
    family, parameters = FAMILIES[arch.family], base_parameters(model)

    def piece(stored: str) -> _Piece:
        names = family.names_of_parts(stored)
        parts = [gathers.get(name, functools.partial(full_tensor, parameters[name])) for name in names]
        size = sum(parameters[name].numel() for name in names)
        gather = parts[0] if len(parts) == 1 else lambda: torch.cat([part() for part in parts])
        return _Piece(family.name_in_folder(stored), size, gather)

    def expert_piece(stored: str, rows: Rows) -> _Piece:
        parameter = parameters[rows.parameter]
        gather = functools.partial(full_expert_rows, parameter, rows.expert, rows.part, rows.parts)
        return _Piece(family.name_in_folder(stored), parameter[0].numel() // rows.parts, gather)

    pieces: dict[str, _Piece] = {}
    for name, parameter in parameters.items():
        if experts := family.rows_of_experts(name, len(parameter)):
            pieces |= {stored: expert_piece(stored, rows) for stored, rows in experts.items()}
        else:
            # The parts of a joined tensor give the same name.
            stored = family.joined_name(name)
            pieces[stored] = pieces.get(stored) or piece(stored)
    return list(pieces.values())


def _adapter_pieces(model: Student) -> list[_Piece]:
    return [
        _Piece(stored_name(adapter.name, which), adapter.rank * size, gather)
        for adapter in folder_adapters(model)
        for which, size, gather in (
            ("lora_A", adapter.parts[0].layer.in_features, adapter.gather_a),
            ("lora_B", adapter.outputs, adapter.gather_b),
        )
    ]


def _split(pieces: list[_Piece], most: int) -> list[_File]:
    """Divides tensors into files of at most `most` elements each, but of one tensor at least."""
    groups: list[list[_Piece]] = [[]]
    for piece in pieces:
        if groups[-1] and sum(member.size for member in groups[-1]) + piece.size > most:
            groups.append([])
        groups[-1].append(piece)
    if len(groups) == 1:
        return [_File("model.safetensors", groups[0])]
    return [_File(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _gather_all(files: list[_File]) -> Iterator[Tensor]:
    """Yields the whole tensors in order. All ranks must take the same steps together."""
    for file in files:
        for piece in file.pieces:
            yield piece.gather()


def _write_weights(folder: Path, files: list[_File], tensors: Iterator[Tensor], dtype: torch.dtype) -> None:
    for file in files:
        state = {piece.name: next(tensors).to("cpu", dtype).contiguous() for piece in file.pieces}
        try:
            save_file(state, folder / file.name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UsageError(
                f"{folder / file.name}: cannot be written ({error}). Free some space and run the same command again."
            ) from None


def _write_index(folder: Path, files: list[_File], dtype: torch.dtype) -> None:
    file_names = {piece.name: file.name for file in files for piece in file.pieces}
    size = sum(piece.size for file in files for piece in file.pieces) * dtype.itemsize
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": file_names})


def _write_adapter_config(model: Student, folder: Path, tokenizer_folder: Path) -> None:
    if adapters := folder_adapters(model):
        rows = replace(model.arch, vocab_size=model.arch.vocab_rows, padded_vocab_size=None)
        base = tokenizer_folder if stored_architecture(tokenizer_folder) == rows else None  # None: layers were dropped
        (folder / ADAPTER).mkdir()
        write_json(folder / ADAPTER / CONFIG, adapter_config(adapters, model.arch.num_layers, base))


def _has_json_end(path: Path) -> bool:
    """Checks that a JSON file ends with a bracket, so that it was not cut short."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip().endswith((b"}", b"]"))


def is_complete_export(folder: Path) -> bool:
    """Checks that a folder holds an exported student without missing or shortened files. Reads no weights."""
    try:
        weights = weight_files(folder)
        if (adapter := folder / ADAPTER).is_dir():
            weights.append(adapter / WEIGHTS)
        for path in weights:
            with safe_open(path, "pt"):  # compares the file's length with its header
                pass
        needed = [folder / "config.json", folder / "tokenizer.json"]
        return all(is_plain_file(path) for path in needed) and all(
            _has_json_end(path) for path in folder.rglob("*.json")
        )
    except (UsageError, OSError, SafetensorError):
        return False


def save_pretrained(  # noqa: PLR0913 (the student, what lies beside it, how it is stored, and who writes)
    model: Student,
    folder: Path,
    tokenizer_folder: Path,
    *,
    chat: ChatFormat | None = None,
    dtype: Dtype = "float32",
    max_file_bytes: int = MAX_FILE_BYTES,
    first: bool = True,
) -> None:
    """Writes a folder that transformers loads: config, weights, the tokenizer's files, and `adapter/` for PEFT.

    Every process must call it. An error of the one that writes stops all. Memory: the weights of one file, on the
    writing process alone.

    Args:
        model: the student, also sharded.
        folder: the new folder.
        tokenizer_folder: the folder whose tokenizer and other files are copied.
        chat: format of the conversations that the student was trained on, if it was.
        dtype: type of the stored weights. Those in `adapter/` are float32.
        max_file_bytes: more weights than this become several files with an index.
        first: this process writes the files.

    Raises:
        UsageError: a file cannot be written.
    """
    files = _split(_model_pieces(model), max_file_bytes // DTYPES[dtype].itemsize)
    adapters = [_File(f"{ADAPTER}/{WEIGHTS}", pieces)] if (pieces := _adapter_pieces(model)) else []
    tensors = _gather_all([*files, *adapters])
    with errors_on_all_ranks(model.parameters()):
        try:
            if first:
                with new_folder(folder) as partial:
                    write_export_files(partial, model.arch, tokenizer_folder, dtype, chat)
                    _write_adapter_config(model, partial, tokenizer_folder)
                    _write_weights(partial, files, tensors, DTYPES[dtype])
                    _write_weights(partial, adapters, tensors, torch.float32)
                    if len(files) > 1:
                        _write_index(partial, files, DTYPES[dtype])
        finally:
            # Gather the rest: all tensors on ranks that do not write, and those after an error on the one that does.
            for _ in tensors:
                pass
