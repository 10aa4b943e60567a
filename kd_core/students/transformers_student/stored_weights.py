"""Weights of a folder into a model of transformers, by the names and conversions that this version of it has.

    stored tensor ─ renamed ─► one parameter           each rank reads its own box of it
    stored tensors ─ stacked, joined, split ─► one or more parameters, of which each rank keeps its box

Ranks hold the tensors of one conversion at a time, such as the experts of one layer, and never the whole model.
"""

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_core.errors import UsageError
from kd_core.sharded_values import fill_sharded, full_tensor
from kd_core.students.decoder.lora_layers import base_parameters
from kd_core.students.huggingface.weights import StoredTensor, open_tensors, weight_files
from kd_core.students.transformers_student.transformers_config import is_composite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("kd")
# Where checkpoints of vision-language models keep the language model.
LANGUAGE_MODEL = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.(?!lm_head))?")
OLD_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$|(^|\.)position_ids$")


class Conversion(NamedTuple):
    """Stored tensors, with the pattern that matched each, and the conversion to parameters. None only renames."""

    target: str
    sources: list[tuple[str, StoredTensor]]
    converter: Any


def stored_values(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers that a folder holds, by name. Tied ones are in it once."""
    temporary = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in temporary}
    return {**base_parameters(model), **buffers}


def _text_name(stored: str, prefix: str) -> str:
    """Returns the name in a language model of a tensor that is stored in a vision-language model."""
    name, replaced = LANGUAGE_MODEL.subn("", stored)
    if not replaced or name.startswith("lm_head."):
        return name
    return f"{prefix}.{name}"


def plan_conversions(
    model: "PreTrainedModel", tensors: Mapping[str, StoredTensor], names: frozenset[str], has_others: bool, folder: Path
) -> list[Conversion]:
    """Returns what of a folder goes where, by transformers' own mapping of names.

    Args:
        model: the model.
        tensors: the stored tensors by name.
        names: the names of all parameters and buffers, tied ones under each of their names.
        has_others: the folder holds other models too, such as one of images, which are left out.
        folder: for errors.

    Raises:
        UsageError: a stored tensor has no place in the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 (an extra)
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key  # noqa: PLC0415

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, parameter_names = model.base_model_prefix, dict.fromkeys(names, True)
    ignored = [OLD_BUFFERS, *map(re.compile, model._keys_to_ignore_on_load_unexpected or ())]  # pyright: ignore[reportPrivateUsage]
    plan: dict[str, Conversion] = {}
    # Numbers in names are sorted as numbers, so that experts are stacked in their order.
    for stored in sorted(
        tensors, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    ):
        name = _text_name(stored, prefix) if has_others else stored
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameter_names)
        if target not in parameter_names and name in parameter_names:
            target, pattern = name, None
        if target not in parameter_names:
            if has_others or any(rule.search(stored) for rule in ignored):
                continue
            raise UsageError(f"{folder}: found {stored!a} of shape {tensors[stored].shape}; wanted no such tensor.")
        converter = None if pattern is None else copy.deepcopy(by_pattern[pattern])
        conversion = plan.setdefault(target, Conversion(target, [], converter))
        conversion.sources.append((pattern or stored, tensors[stored]))
    return list(plan.values())


def _converted(model: "PreTrainedModel", conversion: Conversion) -> Mapping[str, Tensor]:
    """Returns whole parameters by name, made of the whole stored tensors of one conversion."""
    for pattern, tensor in conversion.sources:
        whole = tuple(slice(0, size) for size in tensor.shape)
        conversion.converter.add_tensor(conversion.target, tensor.name, pattern, tensor.read(whole).float())
    try:
        values = conversion.converter.convert(conversion.target, model=model, config=model.config)
    except Exception as error:  # of any operation of transformers, on tensors of other shapes
        path = conversion.sources[0][1].path
        raise UsageError(f"{path}: the tensors of {conversion.target} do not fit together ({error!s:.400}).") from None
    return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


def _check_shape(shape: tuple[int, ...], parameter: Tensor, name: str, folder: Path) -> None:
    if tuple(shape) != tuple(parameter.shape):
        raise UsageError(f"{folder}: found {name} of shape {tuple(shape)}; wanted shape {tuple(parameter.shape)}.")


def _fill_converted(parameter: Tensor, value: Tensor, name: str, folder: Path) -> None:
    _check_shape(value.shape, parameter, name, folder)
    fill_sharded(parameter, lambda box: value[box])


def _fill(model: "PreTrainedModel", plan: list[Conversion], values: dict[str, Tensor], folder: Path) -> Iterator[str]:
    """Fills parameters by a plan, and yields the name of each that is filled."""
    for conversion in plan:
        if conversion.converter is None:
            (_, stored), *doubles = conversion.sources
            if doubles:
                raise UsageError(f"{folder}: {stored.name} and {doubles[0][1].name} are both {conversion.target}.")
            _check_shape(stored.shape, values[conversion.target], stored.name, folder)
            fill_sharded(values[conversion.target], stored.read)
            yield conversion.target
            continue
        for name, value in _converted(model, conversion).items():
            if name not in values:
                raise UsageError(f"{folder}: the tensors of {conversion.target} make {name}; wanted no such tensor.")
            _fill_converted(values[name], value, name, folder)
            yield name


def load_weights(model: "PreTrainedModel", student: nn.Module, tied: Mapping[str, str], folder: Path) -> None:
    """Fills a student's parameters and buffers from a folder, in any layout.

    Args:
        model: the model whose class maps the names.
        student: the student of it, perhaps with adapters, whose parameters are filled.
        tied: further names of tied parameters, and the first one of each.
        folder: the folder.

    Raises:
        UsageError: a tensor is missing, unknown, of another shape or not finite, or a tied pair is stored unlike.
    """
    values = stored_values(student)
    with ExitStack() as stack:
        tensors = {tensor.name: tensor for path in weight_files(folder) for tensor in open_tensors(path, stack)}
        try:
            plan = plan_conversions(model, tensors, frozenset({*values, *tied}), is_composite(folder), folder)
        except (ImportError, AttributeError, TypeError) as error:
            log.warning("%s: this transformers maps names otherwise (%s), so ranks load the whole folder in turn",
                        folder, error)  # fmt: skip
            plan = []
            filled = _load_in_turn(model, values, folder)
        else:
            filled = set[str]()
        # A tied parameter may be stored under each of its names. The first name wins, and the others must be equal.
        targets = {conversion.target for conversion in plan}
        aliases = [
            conversion for conversion in plan if conversion.target in tied and tied[conversion.target] in targets
        ]
        plan = [
            conversion._replace(target=tied.get(conversion.target, conversion.target))
            for conversion in plan if conversion not in aliases
        ]  # fmt: skip
        filled |= {*_fill(model, plan, values, folder)}
        for conversion in aliases:
            _check_equal(conversion.sources[0][1], values[tied[conversion.target]], folder)
    if missing := sorted(values.keys() - filled - _unstored_buffers(student)):
        raise UsageError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}.")


def _unstored_buffers(student: nn.Module) -> set[str]:
    return {name for name, _ in student.named_buffers()}


def _check_equal(stored: StoredTensor, parameter: Tensor, folder: Path) -> None:
    """Checks that a stored tensor has the values of a parameter that it is tied with."""
    whole = tuple(slice(0, size) for size in stored.shape)
    if not torch.equal(stored.read(whole).float(), full_tensor(parameter).float().cpu()):
        raise UsageError(
            f"{folder}: config.json ties embedding and output head, and {stored.name} is stored with other values. Set "
            "tie_word_embeddings to false in config.json."
        )


def _load_in_turn(model: "PreTrainedModel", values: Mapping[str, Tensor], folder: Path) -> set[str]:
    """Fills parameters by a whole model that transformers loads, one rank after the other."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for turn in range(ranks):
        if ranks == 1 or turn == dist.get_rank():
            whole: Any = (
                type(model)
                .__mro__[0]
                .from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, config=model.config
                )
            )
            state: Mapping[str, Tensor] = whole.state_dict()
            for name, parameter in values.items():
                _fill_converted(parameter, state[name], name, folder)
        if ranks > 1:
            dist.barrier()
    return {*values}


@torch.no_grad()
def fill_temporary_buffers(model: "PreTrainedModel", student: nn.Module) -> None:
    """Computes buffers that no folder holds, such as angles of positions, by the family's own initialisation.

    Parameters are marked as initialised, so that it leaves them alone. They are filled after this.
    """
    for tensor in (*student.parameters(), *stored_values(student).values()):
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    for module in student.modules():
        # Blocks of another start may be marked from an earlier call.
        vars(module).pop("_is_hf_initialized", None)
    model.initialize_weights()
