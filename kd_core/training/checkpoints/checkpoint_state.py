"""A run's tensors by name, as a checkpoint holds them: trained parameters, and what the optimiser keeps of each.

Parameters that are not trained are those of the student's start; their norms tell whether it still is the same.
Tensors may be DTensors of any layout: a name means the whole tensor, whoever holds which part of it.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate

from kd_core.errors import UsageError
from kd_core.training.checkpoints.checkpoint_storage import DTYPE_NAMES

State = dict[str, Tensor]
ADAM = ("step", "exp_avg", "exp_avg_sq")
CLOSE = 1e-6  # relative; norms of one and the same tensor differ by the layout's order of adding up


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def model_state(model: nn.Module) -> State:
    """The trained parameters themselves, not copies."""
    return {f"model.{name}": parameter.detach() for name, parameter in trained(model).items()}


def run_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The trained parameters and the optimiser's tensors; of one that has not stepped yet, none.

    Raises:
        UsageError: the optimiser keeps something else, which would be lost.
    """
    state = model_state(model)
    for name, parameter in trained(model).items():
        kept: Mapping[str, object] = optimizer.state.get(parameter, {})
        for key, value in kept.items():
            if not _can_be_kept(value, key, parameter):
                what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(
                    f"optimizer.cls: {type(optimizer).__name__} keeps {key!r} ({what}) of {name}; a checkpoint holds "
                    "tensors of usual types, no larger than their parameter, by names without a dot. Take another."
                )
            state[f"optimizer.{name}.{key}"] = value
    return state


def _can_be_kept(value: object, key: str, parameter: Tensor) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or "." in key or value.dtype not in DTYPE_NAMES:
        return False
    return value.shape == parameter.shape or value.numel() <= max(1, parameter.numel())


def settings_of_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return all that an optimiser's groups hold beside parameters and rates. No checkpoint has it."""
    moving = ("params", "lr", "initial_lr")
    return [{name: value for name, value in group.items() if name not in moving} for group in optimizer.param_groups]


def check_kept(model: nn.Module, optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """Refuse an optimiser, after its first step, of which a checkpoint would not hold all that the step has changed.

    Raises:
        UsageError: what stands in its groups is no longer `settings`, or as in `run_state`.
    """
    run_state(model, optimizer)
    for before, after in zip(settings, settings_of_groups(optimizer), strict=True):
        if changed := sorted(name for name in after if str(after[name]) != str(before.get(name))):
            raise UsageError(
                f"optimizer.cls: a step of {type(optimizer).__name__} changes {', '.join(changed)} of its groups, "
                "which no checkpoint holds, so it could not be resumed. Take one that keeps a state by parameter alone."
            )


def frozen_norms(model: nn.Module) -> dict[str, float]:
    """The norm of each parameter that is not trained, in float64."""
    norms: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            norm = torch.linalg.vector_norm(parameter.detach(), dtype=torch.float64)
            norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms


def check_frozen(stored: Mapping[str, float], here: Mapping[str, float]) -> None:
    """Refuse a start that is not the one beside which a checkpoint was trained.

    Raises:
        UsageError: a parameter that is not trained is another.
    """
    for name in sorted({*stored, *here}):
        was, found = stored.get(name), here.get(name)
        if was is None or found is None or abs(was - found) > CLOSE * max(abs(was), abs(found)):
            raise UsageError(
                f"{name}, which is not trained, has norm {found} here, and had {was} when the checkpoint was written. "
                "The student's folder has changed: restore it."
            )


def _like(parameter: Tensor, name: str, stored: TensorStorageMetadata) -> Tensor:
    """Empty memory for a tensor of the optimiser: laid out as its parameter where it has its shape, else whole."""
    dtype = stored.properties.dtype
    if stored.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    if stored.size.numel() > max(1, parameter.numel()):
        raise UsageError(
            f"{name}: has shape {tuple(stored.size)} in the checkpoint; wanted no more numbers than the parameter's "
            f"{tuple(parameter.shape)}. Take another checkpoint."
        )
    if not stored.size or not isinstance(parameter, DTensor):
        return torch.empty(stored.size, dtype=dtype)
    whole = torch.empty(stored.size, dtype=dtype, device=parameter.device)
    return DTensor.from_local(whole, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim)


def stored_names(metadata: Metadata) -> set[str]:
    """Names of the model's tensors in a checkpoint."""
    return {name for name in metadata.state_dict_metadata if name.startswith("model.")}


def empty_moments(model: nn.Module, metadata: Metadata) -> dict[str, State]:
    """By parameter, memory for all that a checkpoint holds of the optimiser for it."""
    parameters = trained(model)
    moments: dict[str, State] = {name: {} for name in parameters}
    for full_name, stored in metadata.state_dict_metadata.items():
        name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
        if full_name.startswith("optimizer.") and name in parameters and isinstance(stored, TensorStorageMetadata):
            moments[name][key] = _like(parameters[name].detach(), full_name, stored)
    return moments


def put_back(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, State]) -> None:
    """Give the optimiser its tensors; rates and the like stay those that it was built with.

    Raises:
        UsageError: they are of other shapes than a fused kernel's, which trusts them.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        fused = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            kept, shape = moments[names[parameter]], tuple(parameter.shape)
            if kept and fused:
                shapes = {key: tuple(tensor.shape) for key, tensor in kept.items()}
                keys = dict.fromkeys((*(ADAM if "betas" in group else ()), *shapes))
                _check_moments(names[parameter], shapes, {key: () if key == "step" else shape for key in keys})
            if kept:  # as torch's own load_state_dict places them, but in the dtype that they were kept in
                optimizer.state[parameter] = {
                    key: tensor if key == "step" and not fused else tensor.to(parameter.device)
                    for key, tensor in kept.items()
                }


def _check_moments(name: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise UsageError(f"optimizer.{name}: the checkpoint holds {found}; wanted {wanted}. Take another checkpoint.")


def staged(state: State, buffers: State) -> State:
    """A copy in this machine's memory, kept in `buffers`, which the next copy uses again."""
    copies: State = {}
    for name, tensor in state.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in buffers:
            pinned = local.device.type == "cuda"
            buffers[name] = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=pinned)
        buffers[name].copy_(local, non_blocking=True)
        copies[name] = _in_place_of(tensor, buffers[name])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _in_place_of(tensor: Tensor, copy: Tensor) -> Tensor:
    """The copy as the same part of the same whole. (`from_local` would move it to the mesh's device.)"""
    if not isinstance(tensor, DTensor):
        return copy
    spec = tensor._spec  # pyright: ignore[reportPrivateUsage]
    return DTensor(copy, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]
