"""A run's tensors by name, as a checkpoint holds them: trained parameters, and the optimiser's state of each.

    model.NAME           a trained parameter
    optimizer.NAME.KEY   a tensor of the optimiser for that parameter, such as exp_avg

Parameters that are not trained come from the student's start. A checkpoint holds their norms alone, to detect that the
start has changed. Tensors may be DTensors of any layout: a name means the whole tensor, however ranks divide it.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from kd_core.errors import UsageError
from kd_core.sharded_values import full_value, replicated_empty
from kd_core.training.checkpoints.checkpoint_storage import DTYPE_NAMES
from kd_core.training.checkpoints.eight_bit_state import is_plain, joined_states, plain_tensors

State = dict[str, Tensor]
ADAM = ("step", "exp_avg", "exp_avg_sq")
CLOSE = 1e-6  # relative: layouts add up the squares of a norm in different orders


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def model_state(model: nn.Module) -> State:
    """Returns the trained parameters themselves, not copies."""
    return {f"model.{name}": parameter.detach() for name, parameter in trained_parameters(model).items()}


def run_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Returns the trained parameters and the optimiser's tensors. Before its first step, an optimiser has none.

    Raises:
        UsageError: the optimiser's state holds something else, which a checkpoint would lose.
    """
    state = model_state(model)
    for name, parameter in trained_parameters(model).items():
        parameter_state: Mapping[str, object] = optimizer.state.get(parameter, {})
        tensors = {
            k: v for key, value in parameter_state.items() for k, v in plain_tensors(key, value, parameter).items()
        }
        for key, value in tensors.items():
            if not _can_be_stored(value, key, parameter):
                kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(
                    f"optimizer.cls: {type(optimizer).__name__} keeps {key!r} ({kind}) of {name}; a checkpoint holds "
                    "tensors of usual types, no larger than their parameter, by names without a dot. Take another."
                )
            state[f"optimizer.{name}.{key}"] = value
    return state


def _can_be_stored(value: object, key: str, parameter: Tensor) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or "." in key or value.dtype not in DTYPE_NAMES or not is_plain(value):
        return False
    return value.shape == parameter.shape or value.numel() <= max(1, parameter.numel())


def read_group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Returns the settings of an optimiser's groups, without parameters and rates. No checkpoint holds them."""
    left_out = ("params", "lr", "initial_lr")
    return [{name: value for name, value in group.items() if name not in left_out} for group in optimizer.param_groups]


def check_resumable(model: nn.Module, optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """Checks, after an optimiser's first step, that a checkpoint holds everything that the step has changed.

    Raises:
        UsageError: the settings of its groups are no longer `settings`, or as in `run_state`.
    """
    run_state(model, optimizer)
    for before, after in zip(settings, read_group_settings(optimizer), strict=True):
        if changed := sorted(name for name in after if str(after[name]) != str(before.get(name))):
            raise UsageError(
                f"optimizer.cls: a step of {type(optimizer).__name__} changes {', '.join(changed)} of its groups, "
                "which no checkpoint holds, so it could not be resumed. Use one that keeps its state by parameter "
                "alone."
            )


def frozen_norms(model: nn.Module) -> dict[str, float]:
    """Returns the L2 norm of each parameter that is not trained, computed in float64."""
    norms: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            norm = torch.linalg.vector_norm(parameter.detach(), dtype=torch.float64)
            norms[name] = full_value(norm)
    return norms


def check_frozen(stored_norms: Mapping[str, float], norms: Mapping[str, float]) -> None:
    """Checks that the student's start is the one that the checkpoint's run began from.

    Raises:
        UsageError: the norm of a parameter that is not trained has changed.
    """
    for name in sorted({*stored_norms, *norms}):
        old, new = stored_norms.get(name), norms.get(name)
        if old is None or new is None or abs(old - new) > CLOSE * max(abs(old), abs(new)):
            raise UsageError(
                f"{name}, which is not trained, has norm {new} here, and had {old} when the checkpoint was written. "
                "The student's folder has changed. Restore it."
            )


def _empty_moment(parameter: Tensor, name: str, stored: TensorStorageMetadata) -> Tensor:
    """Allocates a tensor of the optimiser. It has the layout of its parameter if it has its shape, else it is whole.

    Raises:
        UsageError: the stored tensor is larger than its parameter.
    """
    dtype = stored.properties.dtype
    if stored.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    if stored.size.numel() > max(1, parameter.numel()):
        raise UsageError(
            f"{name}: has shape {tuple(stored.size)} in the checkpoint; wanted no more numbers than the parameter's "
            f"{tuple(parameter.shape)}. Use another checkpoint."
        )
    return replicated_empty(stored.size, dtype, parameter)


def stored_names(metadata: Metadata) -> set[str]:
    """Returns the names of the model's tensors in a checkpoint."""
    return {name for name in metadata.state_dict_metadata if name.startswith("model.")}


def empty_moments(model: nn.Module, metadata: Metadata) -> dict[str, State]:
    """Allocates the optimiser's tensors of each parameter, as a checkpoint holds them, by the parameter's name."""
    parameters = trained_parameters(model)
    moments: dict[str, State] = {name: {} for name in parameters}
    for full_name, stored in metadata.state_dict_metadata.items():
        name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
        if full_name.startswith("optimizer.") and name in parameters and isinstance(stored, TensorStorageMetadata):
            moments[name][key] = _empty_moment(parameters[name].detach(), full_name, stored)
    return moments


def restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, State]) -> None:
    """Puts loaded tensors into the optimiser's state. Rates and other settings stay as they were built.

    Raises:
        UsageError: tensors of a fused optimiser are not of its shapes, which its kernel does not check.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        fused = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            tensors, shape = moments[names[parameter]], tuple(parameter.shape)
            if tensors and fused:
                shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
                keys = dict.fromkeys((*(ADAM if "betas" in group else ()), *shapes))
                _check_moments(names[parameter], shapes, {key: () if key == "step" else shape for key in keys})
            if tensors:  # placed as torch's load_state_dict places them, but in their stored dtype
                placed = {
                    key: tensor if key == "step" and not fused else tensor.to(parameter.device)
                    for key, tensor in tensors.items()
                }
                optimizer.state[parameter] = joined_states(placed, parameter, names[parameter])


def _check_moments(name: str, stored_shapes: object, shapes: object) -> None:
    if stored_shapes != shapes:
        raise UsageError(
            f"optimizer.{name}: the checkpoint holds {stored_shapes}; wanted {shapes}. Use another checkpoint."
        )
