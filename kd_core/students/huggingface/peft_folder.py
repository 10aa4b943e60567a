"""Adapters in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`."""

import re
from pathlib import Path
from typing import Any

from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, is_plain_file, read_json
from kd_core.hub import snapshot_of_folder
from kd_core.students.huggingface.folder_adapters import FolderAdapter, folder_adapters, rank_fields
from kd_core.students.huggingface.weights import stored_tensors
from kd_core.students.student import Student

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, NUMBERED = "base_model.model.", re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Initialisations that leave the base as it is. The others of PEFT 0.21 change it: pissa, olora, corda, …
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Settings that would change the meaning of an adapter.
UNSUPPORTED_FIELDS = (
    "fan_in_fan_out", "modules_to_save", "use_dora", "use_qalora", "lora_bias",
    "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip


def stored_name(model: Student, layer: str, which: str) -> str:
    """Returns the name in PEFT's file of a layer's `lora_A` or `lora_B`."""
    return f"{PREFIX}{model.names_in_folder}{layer}.{which}.weight"


def _our_name(model: Student, stored: str) -> str:
    return stored.removeprefix(PREFIX).removeprefix(model.names_in_folder).removesuffix(".weight")


def _files(folder: Path) -> list[Path]:
    path = folder / WEIGHTS
    if not is_plain_file(path):
        raise UsageError(f"{path}: no such file; wanted an adapter in PEFT's format.")
    return [path]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = read_json(path, "a PEFT adapter's configuration")
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' is supported.")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{path}: bias is {config['bias']!r}; only 'none' is supported.")
    if (init := config.get("init_lora_weights", True)) not in PLAIN_BEGINNINGS:
        raise UsageError(
            f"{path}: init_lora_weights is {init!r}, which also changes the base, by values that are not in the "
            f"adapter; wanted one of {PLAIN_BEGINNINGS}. Save it as a plain one (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it into its base and take that as the folder."
        )
    for name in UNSUPPORTED_FIELDS:
        if config.get(name):
            raise UsageError(f"{path}: {name} is {config[name]!r}, which is not supported.")
    return config


def check_adapter_matches(folder: Path, model: Student) -> None:
    """Checks that a stored adapter has the settings and the layers of the model's adapters. Dropout may differ.

    Raises:
        UsageError: it has others, or it is not supported. The message names what to set.
    """
    config, adapters = _read_config(folder), folder_adapters(model)
    settings = adapters[0].parts[0].layer.settings
    with damage_as_usage_error(folder / CONFIG, "a PEFT adapter's configuration"):
        compared = {
            "rank": (settings.rank, int(config.get("r", 8))),
            "alpha": (settings.alpha, float(config.get("lora_alpha", 8))),
            "rank_stabilised": (settings.rank_stabilised, bool(config.get("use_rslora", False))),
        }
    for name, (ours, theirs) in compared.items():
        if ours != theirs:
            raise UsageError(f"student.{name}: got {ours}; {folder} has {theirs}. Set student.{name}={theirs}.")
    for name, ranks in rank_fields(adapters).items():
        if (theirs := config.get(name)) and theirs != ranks:
            raise UsageError(f"{folder / CONFIG}: {name} is {theirs!r}, which is not supported.")
    names = {_our_name(model, tensor.name).rsplit(".", 1)[0] for tensor in stored_tensors(_files(folder))}
    own_names = {adapter.name for adapter in adapters}
    if names != own_names:
        theirs_only, ours_only = sorted(names - own_names), sorted(own_names - names)
        example = f"{theirs_only[0]} there alone" if theirs_only else f"{ours_only[0]} here alone"
        raise UsageError(
            f"student.targets: {folder} adapts {len(names)} layers, the student {len(own_names)} ({example}). "
            "Set student.targets and student.layers to those of the adapter."
        )


def load_adapter(model: Student, folder: Path) -> None:
    """Copies a stored adapter into the model's adapters. `check_adapter_matches` must have passed.

    Raises:
        UsageError: a tensor is missing, of another shape, or not finite.
    """
    has_ranks = bool(_read_config(folder).get("rank_pattern"))
    remaining = {
        f"{adapter.name}.{which}": adapter for adapter in folder_adapters(model) for which in ("lora_A", "lora_B")
    }
    for stored in stored_tensors(_files(folder)):
        name = _our_name(model, stored.name)
        if (adapter := remaining.pop(name, None)) is None:
            raise UsageError(f"{stored.path}: found {stored.name}; wanted no such tensor.")
        rank = adapter.rank if has_ranks else adapter.parts[0].layer.settings.rank
        adapter.fill(name.rsplit(".", 1)[1], stored, rank)
    if remaining:
        raise UsageError(f"{folder}: {len(remaining)} tensors are missing, the first is {min(remaining)}.")


def _target_fields(names: list[str], num_layers: int) -> dict[str, Any]:
    """Returns the fields of PEFT that name the adapted modules.

    If every adapted layer has the same modules, they are lists of modules and layers, as people write them. Otherwise
    they are the full names.
    """
    # ….layers.{layer}.….{last} → (layer, last)
    numbers = [NUMBERED.search(name) for name in names]
    pairs = {(int(number[1]), name.rsplit(".", 1)[1]) for name, number in zip(names, numbers, strict=True) if number}
    layers, lasts = sorted({layer for layer, _ in pairs}), sorted({last for _, last in pairs})
    if not len(names) == len(pairs) == len(layers) * len(lasts):
        return {"target_modules": sorted(names)}
    chosen = None if len(layers) == num_layers else layers
    return {
        "target_modules": lasts,
        "layers_to_transform": chosen,
        "layers_pattern": None if chosen is None else "layers",
    }


def adapter_config(model: Student, adapters: list[FolderAdapter], base_folder: Path | None) -> dict[str, Any]:
    """Returns the `adapter_config.json` of a model's adapters.

    `base_folder` is None if no folder has the frozen weights.
    """
    settings, ranks = adapters[0].parts[0].layer.settings, rank_fields(adapters)
    names = [f"{model.names_in_folder}{adapter.name}" for adapter in adapters]
    fetched = None if base_folder is None else snapshot_of_folder(base_folder)
    base = fetched.repository if fetched else base_folder and str(base_folder)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": fetched.commit if fetched else None,
        "inference_mode": True,
        "bias": "none",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilised,
        **({} if ranks["rank_pattern"] == {} else ranks),
        **_target_fields(names, model.arch.num_layers),
    }
