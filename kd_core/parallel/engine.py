"""The engine: passes of a student over batches. A schedule of another kind, such as a pipeline's, belongs here."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from kd_core.losses.fused.loss import LossSums
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.sharded_values import full_value
from kd_core.types import Batch


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Batch], loss_of: Callable[[Batch], LossSums], parallel: Parallel, world: World
) -> list[LossSums]:
    """Runs forward and backward passes over the micro-batches of a step, and returns the loss of each.

    Gradients add up on the rank. They are summed over ranks in the backward pass of the last micro-batch alone.

    Args:
        model: the student, which `loss_of` runs.
        batches: the micro-batches of this rank.
        loss_of: the forward pass of a micro-batch, from tokens to the loss (`batch_loss` of a training step).
        parallel: precision and sharding.
        world: the ranks.
    """
    losses: list[LossSums] = []
    for batch in batches:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(batch is batches[-1])
        with parallel.autocast(world.device):
            loss = loss_of(batch.to(world.device))
        loss.total.backward()
        losses.append(loss)
    return losses


@contextlib.contextmanager
def evaluation(model: nn.Module, parallel: Parallel, world: World) -> Generator[None]:
    """Runs the passes of its block without gradients. It reshards weights that they have left gathered."""
    # Autocast is around all passes, so that each parameter is rounded once.
    with torch.no_grad(), parallel.autocast(world.device):
        yield
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients in place so that their global L2 norm is at most `max_norm`.

    Returns the norm before clipping, over all parameters and ranks.
    """
    # g ← g · min(1, max_norm / ‖g‖), with ‖g‖ over all parameters.
    return full_value(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
