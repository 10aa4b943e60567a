"""The engine: passes of a student over batches. A schedule of another kind, such as a pipeline's, belongs here."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kd_core.losses.fused.loss import LossSums
from kd_core.parallel.config import Parallel
from kd_core.parallel.transfers import device_batches
from kd_core.parallel.world import World
from kd_core.sharded_values import full_tensor
from kd_core.types import Batch


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Batch], loss_of: Callable[[Batch], LossSums], parallel: Parallel, world: World
) -> list[LossSums]:
    """Runs forward and backward passes over the micro-batches of a step, and returns the loss of each.

    Gradients add up on the rank. They are summed over ranks in the backward pass of the last micro-batch alone, except
    under full sharding, where no rank could hold the gradients of all parameters.

    Args:
        model: the student, which `loss_of` runs.
        batches: the micro-batches of this rank.
        loss_of: the forward pass of a micro-batch, from tokens to the loss (`batch_loss` of a training step).
        parallel: precision and sharding.
        world: the ranks.
    """
    losses: list[LossSums] = []
    for number, batch in enumerate(device_batches(batches, world.device), 1):
        if isinstance(model, FSDPModule):
            _set_sync(model, parallel, is_last=number == len(batches))
        with parallel.autocast(world.device):
            loss = loss_of(batch)
        with parallel.backward_kernels():
            loss.total.backward()
        losses.append(loss)
    return losses


def _set_sync(model: FSDPModule, parallel: Parallel, is_last: bool) -> None:
    """Sets what the next backward pass does with gradients and gathered weights."""
    if parallel.shard == "full":
        # Each pass leaves this rank's shard of the gradients. Copies of the student are added up in the last pass.
        model.set_requires_all_reduce(is_last)
        model.set_reshard_after_backward(is_last, recurse=False)
    else:
        model.set_requires_gradient_sync(is_last)
        # Weights stay gathered until no pass of this step needs them.
        model.set_reshard_after_backward(is_last)


@contextlib.contextmanager
def evaluation(model: nn.Module, parallel: Parallel, world: World) -> Generator[None]:
    """Runs the passes of its block without gradients. It reshards weights that they have left gathered."""
    # Autocast is around all passes, so that each parameter is rounded once.
    with torch.no_grad(), parallel.autocast(world.device):
        yield
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the global L2 norm of all gradients [], over all parameters and ranks, on their device."""
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
