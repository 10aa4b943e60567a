"""One optimiser step: count, forward and backward over micro-batches, one sum over ranks, check, move."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from kd_core.errors import NonFiniteError
from kd_core.losses.fused.lm_head import LogitHead
from kd_core.losses.fused.loss import LossSums, fused_loss
from kd_core.losses.objective import Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import gradients_wait
from kd_core.parallel.vocab_parallel import local_head
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.types import Batch


@dataclass(frozen=True)
class StepSums:
    """Sums over all scored positions of the step, on all ranks."""

    sums: dict[str, float]
    tokens: int
    grad_norm: float
    damaged_blocks: int = 0
    moved: bool = True


def batch_loss(model: Decoder, batch: Batch, objective: Objective, scale: float) -> LossSums:
    """The objective over one batch, through the model's own forward."""

    def head(hidden: Tensor, weight: Tensor) -> LossSums:
        here = local_head(hidden, weight)
        flat = rearrange(here.hidden, "B T D -> (B T) D")
        form = LogitHead(vocab_size=model.arch.vocab_size, part=here.part)
        labels, mask = batch.labels.flatten(), batch.loss_mask.flatten()
        return fused_loss(flat, here.weight, batch.teacher(), labels, mask, objective, scale, form)

    return model(batch.tokens, batch.position_ids, batch.document_ids, head)


def count(batches: Sequence[Batch], world: World) -> tuple[int, int]:
    """Scored positions, and damaged blocks, of all batches on all ranks."""
    own = {
        "tokens": float(sum(int(batch.loss_mask.sum()) for batch in batches)),
        "damaged_blocks": float(sum(batch.damaged_blocks for batch in batches)),
    }
    total = world.sum_floats(own)
    return int(total["tokens"]), int(total["damaged_blocks"])


def sum_over(batch_sums: Sequence[LossSums], names: Sequence[str], world: World) -> dict[str, float]:
    """Add up batches and ranks; a rank without batches adds zeros under the same names."""
    own = {name: sum((float(loss.sums[name]) for loss in batch_sums), 0.0) for name in names}
    return world.sum_floats(own)


def clip_(parameters: Iterable[Parameter], most: float) -> float:
    """Scale all gradients so that their common norm is at most so much; returns what it was, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def train_step(  # noqa: PLR0913 (a step is made of exactly these)
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    objective: Objective,
    clip_norm: float,
    parallel: Parallel,
    world: World,
) -> StepSums:
    """Move the parameters once, by the gradient of the mean over all scored tokens of the step.

    A step of nothing does not move them: no scored token on any rank, or a weight of 0 for every term. The optimiser
    would still decay them and follow its momentum.

    Raises:
        NonFiniteError: loss or gradient is not finite, on any rank; no rank has moved then.
    """
    tokens, damaged_blocks = count(batches, world)
    losses: list[LossSums] = []
    for batch in batches:
        gradients_wait(model, batch is not batches[-1])
        on_device = batch.to(world.device)
        with parallel.autocast(world.device):
            loss = batch_loss(model, on_device, objective, 1.0 / max(1, tokens))
        loss.total.backward()
        losses.append(loss)
    sums = sum_over(losses, objective.sum_names(), world)
    norm = clip_(model.parameters(), clip_norm or torch.inf)
    if not (torch.isfinite(torch.tensor([norm, sums["loss"]])).all()):
        optimizer.zero_grad()
        raise NonFiniteError(f"loss sum {sums['loss']}, gradient norm {norm}")
    moved = tokens > 0 and any(objective.weights().values())
    if moved:
        optimizer.step()
    optimizer.zero_grad()
    return StepSums(sums, tokens, norm, damaged_blocks, moved)
