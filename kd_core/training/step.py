"""One optimiser step over the micro-batches of all ranks.

    count scored tokens ─► forward, backward per micro-batch ─► sum over ranks ─► clip ─► check ─► move

The loss of the step is the mean over all scored tokens, of all micro-batches and ranks. Each micro-batch's sum is
divided by that count before its backward pass, so the gradients only need to be added up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from kd_core.errors import NonFiniteError
from kd_core.losses.fused.loss import LossSums, fused_loss
from kd_core.losses.objective import Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.engine import accumulate_gradients, clip_gradients_
from kd_core.parallel.vocab_parallel import local_lm_head
from kd_core.parallel.world import World
from kd_core.students.student import Student
from kd_core.types import Batch


@dataclass(frozen=True)
class StepSums:
    """Sums over all scored positions of the step, on all ranks."""

    sums: dict[str, float]
    tokens: int
    grad_norm: float
    damaged_blocks: int = 0
    moved: bool = True


def batch_loss(model: Student, batch: Batch, objective: Objective, scale: float) -> LossSums:
    """Computes the objective's sums over one batch, through the model's own forward.

    `scale` multiplies the loss that is differentiated: 1 / scored tokens of the whole step.
    """

    def loss_of_hidden(hidden: Tensor, weight: Tensor) -> LossSums:
        # This rank's rows of the lm_head, and the hidden states of whole rows.  [V / ranks, D], [B, T, D]
        local = local_lm_head(hidden, weight)
        # The loss works on positions, whatever row they are of.  [N, D]
        flat = rearrange(local.hidden, "B T D -> (B T) D")
        teacher, labels, mask = batch.targets()
        # Fused with the lm_head, so that the logits [N, V] are never held as a whole.
        return fused_loss(
            flat,
            local.weight,
            teacher,
            labels,
            mask,
            objective,
            scale,
            form=model.lm_head_form,
            shard=local.vocab_shard,
        )

    # The loss runs inside the model's forward, as `Student.forward` explains.
    return model(batch.tokens, batch.position_ids, batch.document_ids, loss_of_hidden, batch.documents)


def count_tokens_and_damage(batches: Sequence[Batch], world: World) -> tuple[int, int]:
    """Returns the numbers of scored positions and of damaged blocks in all batches on all ranks."""
    local_counts = {
        "tokens": float(sum(int(batch.loss_mask.sum()) for batch in batches)),
        "damaged_blocks": float(sum(batch.damaged_blocks for batch in batches)),
    }
    total = world.sum_floats(local_counts)
    return int(total["tokens"]), int(total["damaged_blocks"])


def sum_losses(batch_sums: Sequence[LossSums], names: Sequence[str], world: World) -> dict[str, float]:
    """Adds up the named sums over batches and ranks. A rank without batches adds zeros under the same names."""
    local_sums = {name: sum((float(loss.sums[name]) for loss in batch_sums), 0.0) for name in names}
    return world.sum_floats(local_sums)


def train_step(  # noqa: PLR0913 (a step is made of exactly these)
    model: Student,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    objective: Objective,
    clip_norm: float,
    parallel: Parallel,
    world: World,
) -> StepSums:
    """Moves the parameters once, by the gradient of the mean over all scored tokens of the step.

    The optimiser does not step if no token is scored on any rank, or if every term has weight 0. It would still apply
    weight decay and momentum then.

    Raises:
        NonFiniteError: the loss or a gradient is not finite, on any rank. No rank has moved then.
    """
    # The divisor of every micro-batch: scored tokens of the whole step, over all ranks.
    tokens, damaged_blocks = count_tokens_and_damage(batches, world)
    loss_of = partial(batch_loss, model, objective=objective, scale=1.0 / max(1, tokens))
    losses = accumulate_gradients(model, batches, loss_of, parallel, world)
    sums = sum_losses(losses, objective.sum_names(), world)
    # A clip norm of 0 stands for none: the norm is measured all the same.
    norm = clip_gradients_(model.parameters(), clip_norm or torch.inf)
    # Loss and norm are sums over all ranks, so every rank comes to the same decision.
    if not (math.isfinite(norm) and math.isfinite(sums["loss"])):
        optimizer.zero_grad()
        raise NonFiniteError(f"loss sum {sums['loss']}, gradient norm {norm}")
    moved = tokens > 0 and any(objective.weights().values())
    if moved:
        optimizer.step()
    optimizer.zero_grad()
    return StepSums(sums, tokens, norm, damaged_blocks, moved)
