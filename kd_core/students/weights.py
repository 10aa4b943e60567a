"""Weights in and out of Hugging Face folders (safetensors, one file or sharded)."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.files import new_folder, read_json, write_json
from kd_core.students.decoder import Architecture, Decoder
from kd_core.students.families import config_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, in a stable order.

    Raises:
        UsageError: there are none, or the index names one that is missing.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index, "a safetensors index")["weight_map"].values()))
    files = [folder / name for name in names]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UsageError(f"{missing[0]}: no such file; wanted the weights of a Hugging Face folder.")
    return files


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name.removeprefix("model."), file.get_tensor(name)
        except SafetensorError as error:
            raise UsageError(f"{path}: damaged weights ({error}). Fetch or export the folder again.") from None


def _new_name(name: str, position_of: dict[int, int]) -> str | None:
    """The student's name of a stored tensor; None where its layer was dropped."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{position_of[int(layer)]}.{rest}" if int(layer) in position_of else None


def load_weights(model: Decoder, folder: Path, keep_layers: tuple[int, ...]) -> None:
    """Copy the folder's weights into `model`, whose layer i is the folder's layer `keep_layers[i]`.

    Raises:
        UsageError: a tensor is missing, unknown, of another shape, or not finite.
    """
    position_of = {stored: new for new, stored in enumerate(keep_layers)}
    wanted = dict(model.named_parameters())
    for stored_name, tensor in _stored_tensors(folder):
        name = _new_name(stored_name, position_of)
        if name is None or (name == "lm_head.weight" and model.arch.tie_embeddings):
            continue
        parameter = wanted.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            want = "no such tensor" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise UsageError(f"{folder}: found {stored_name} of shape {tuple(tensor.shape)}; wanted {want}.")
        if not tensor.isfinite().all():
            raise UsageError(f"{folder}: {stored_name} holds NaN or infinite values. Fetch the folder again.")
        with torch.no_grad():
            parameter.copy_(tensor)
    if wanted:
        raise UsageError(f"{folder}: {len(wanted)} tensors are missing, the first is {min(wanted)}.")


def empty_decoder(arch: Architecture, device: torch.device) -> Decoder:
    """A decoder built on the meta device and materialised, in float32, without values yet."""
    with torch.device("meta"):
        model = Decoder(arch)
    model = model.to_empty(device=device)
    model.tie()
    return model


def save_pretrained(model: Decoder, folder: Path, tokenizer_folder: Path) -> None:
    """Write a folder that transformers loads: config, weights, and the tokenizer's files copied along."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.arch.tie_embeddings:
        del state["lm_head.weight"]
    files = {name: f"model.{name}" if name != "lm_head.weight" else name for name in state}
    tokenizer_files = [tokenizer_folder / name for name in TOKENIZER_FILES if (tokenizer_folder / name).is_file()]
    source = json.loads((tokenizer_folder / "config.json").read_text())
    with new_folder(folder) as partial:
        write_json(
            partial / "config.json",
            config_of(model.arch, source.get("bos_token_id"), source.get("eos_token_id")),
        )
        for file in tokenizer_files:
            (partial / file.name).write_bytes(file.read_bytes())
        save_file({files[k]: v for k, v in state.items()}, partial / "model.safetensors", metadata={"format": "pt"})
