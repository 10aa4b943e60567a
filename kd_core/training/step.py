"""One optimiser step over the micro-batches of all ranks.

    count scored tokens ─► forward, backward per micro-batch ─► sum over ranks ─► move if finite ─► numbers

The loss of the step is the mean over all scored tokens, of all micro-batches and ranks. Each micro-batch's sum is
divided by that count before its backward pass, so the gradients only need to be added up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from kd_core.errors import NonFiniteError
from kd_core.losses.fused.loss import LossSums, fused_loss
from kd_core.losses.objective import Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.engine import accumulate_gradients, gradient_norm
from kd_core.parallel.transfers import HostCopy
from kd_core.parallel.vocab_parallel import local_lm_head
from kd_core.parallel.world import World
from kd_core.students.student import Student
from kd_core.training.move import clip_and_step, decides_on_device, step_if_finite
from kd_core.types import Batch


@dataclass(frozen=True)
class StepSums:
    """Sums over all scored positions of the step, on all ranks."""

    sums: dict[str, float]
    tokens: int
    grad_norm: float
    damaged_blocks: int = 0
    moved: bool = True


@dataclass(frozen=True)
class BegunStep:
    """A step whose numbers may still be on their way from the device: sums by `names`, and the gradient norm.

    `moves` is false if no gradient has a weight. `is_late` is true if the numbers were not needed for the step itself,
    so that they can be read behind the next one.
    """

    names: list[str]
    numbers: HostCopy
    tokens: int
    damaged_blocks: int
    moves: bool
    is_late: bool

    def is_finite(self) -> bool:
        """Waits for the numbers, and checks loss and gradient norm."""
        *values, norm = self.numbers.read()
        return math.isfinite(norm) and math.isfinite(values[self.names.index("loss")])

    def read(self) -> StepSums:
        """Waits for the numbers, and returns them.

        Raises:
            NonFiniteError: the loss or a gradient is not finite, on any rank. No rank has moved then.
        """
        *values, norm = self.numbers.read()
        sums = dict(zip(self.names, values, strict=True))
        if not self.is_finite():
            raise NonFiniteError(f"loss sum {sums['loss']}, gradient norm {norm}")
        return StepSums(sums, self.tokens, norm, self.damaged_blocks, self.moves)


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

    def add_auxiliary(loss: LossSums, values: Mapping[str, Tensor]) -> LossSums:
        total, sums, weights = loss.total, dict(loss.sums), objective.weights()
        for name, term in objective.auxiliary().items():
            # The sum over positions that are not padding.  [B, T] → scalar
            value = torch.where(batch.document_ids >= 0, values[term.name], 0.0).sum()
            total = total + weights[name] * scale * value
            sums[f"{name}_loss"] = value.detach().double()
            sums["loss"] = sums["loss"] + weights[name] * sums[f"{name}_loss"]
        return LossSums(total, sums)

    # The loss runs inside the model's forward, as `Student.forward` explains.
    auxiliary = add_auxiliary if objective.auxiliary() else None
    return model(
        batch.tokens, batch.position_ids, batch.document_ids, loss_of_hidden, batch.documents, auxiliary=auxiliary
    )


def count_tokens_and_damage(batches: Sequence[Batch], world: World) -> tuple[int, int]:
    """Returns the numbers of scored positions and of damaged blocks in all batches on all ranks."""
    local_counts = {
        "tokens": float(sum(int(batch.loss_mask.sum()) for batch in batches)),
        "damaged_blocks": float(sum(batch.damaged_blocks for batch in batches)),
    }
    total = world.sum_floats(local_counts)
    return int(total["tokens"]), int(total["damaged_blocks"])


def add_losses(batch_sums: Sequence[LossSums], names: Sequence[str], world: World) -> Tensor:
    """Adds up the named sums over batches and ranks, in float64 on the device, [names].

    A rank without batches adds zeros.
    """
    total = torch.zeros(len(names), dtype=torch.float64, device=world.device)
    for loss in batch_sums:
        total += torch.stack([loss.sums[name] for name in names])
    return world.sum_(total)


def sum_losses(batch_sums: Sequence[LossSums], names: Sequence[str], world: World) -> dict[str, float]:
    """Returns the sums of `add_losses` by name, in order of their names."""
    names = sorted(names)
    return dict(zip(names, add_losses(batch_sums, names, world).tolist(), strict=True))


def begin_step(  # noqa: PLR0913 (a step is made of exactly these)
    model: Student,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    objective: Objective,
    clip_norm: float,
    parallel: Parallel,
    world: World,
) -> BegunStep:
    """Moves the parameters once, by the gradient of the mean over all scored tokens of the step.

    The optimiser does not step if loss or gradient is not finite, if no token is scored on any rank, or if every term
    has weight 0. It would still apply weight decay and momentum then. A GPU decides the first by itself where the
    optimiser's kernel can. The host then waits for nothing between the first forward pass and the end of the step.
    """
    # The divisor of every micro-batch: scored tokens of the whole step, over all ranks.
    tokens, damaged_blocks = count_tokens_and_damage(batches, world)
    loss_of = partial(batch_loss, model, objective=objective, scale=1.0 / max(1, tokens))
    losses = accumulate_gradients(model, batches, loss_of, parallel, world)
    names = sorted(objective.sum_names())
    # Loss and norm are sums over all ranks, so every rank comes to the same decision.  [names], []
    sums, norm = add_losses(losses, names, world), gradient_norm(model.parameters())
    moves, is_late = tokens > 0 and any(objective.weights().values()), decides_on_device(optimizer, world.device)
    # One copy for all numbers of the step.  [names + 1]
    numbers = HostCopy(torch.cat([sums, norm.to(sums)[None]]))
    step = BegunStep(names, numbers, tokens, damaged_blocks, moves, is_late)
    if moves and is_late:
        step_if_finite(optimizer, sums[names.index("loss")], norm, clip_norm)
    elif moves and step.is_finite():
        clip_and_step(optimizer, model.parameters(), norm, clip_norm)
    optimizer.zero_grad()
    return step


def train_step(  # noqa: PLR0913 (those of `begin_step`)
    model: Student,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    objective: Objective,
    clip_norm: float,
    parallel: Parallel,
    world: World,
) -> StepSums:
    """Takes a step as `begin_step` does, and waits for its numbers.

    Raises:
        NonFiniteError: the loss or a gradient is not finite, on any rank. No rank has moved then.
    """
    step = begin_step(
        model, optimizer, batches, objective=objective, clip_norm=clip_norm, parallel=parallel, world=world
    )
    return step.read()
