"""A student against a teacher's cache: the training objective, and always NLL, KL to the teacher and agreement."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from tqdm import tqdm

from kd_core.losses.fused import LossSums
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.parallel.mesh import World
from kd_core.parallel.plan import Parallel
from kd_core.students.decoder import Decoder
from kd_core.training.metrics import per_token
from kd_core.training.step import batch_loss, sum_over
from kd_core.types import Batch

STANDARD = {
    "nll": CrossEntropy(weight=0.0),
    "kl": Distillation(weight=0.0, divergence="forward_kl", tail="tail_bucket"),
}


def _measured(objective: Objective) -> Objective:
    """With the standard terms, whose cross-entropy also makes every pass one over the whole vocabulary."""
    return replace(objective, terms={**objective.terms, **STANDARD}, observe=("student_entropy",))


def metric_names(objective: Objective) -> set[str]:
    """Names of what `evaluate` returns."""
    standard = {f"{name}_loss" for name in STANDARD}
    sums = (name for name in _measured(objective).sum_names() if name not in standard)
    return {f"val/{name}" for name in (*sums, *STANDARD, "teacher_nll", "tokens")}


@torch.no_grad()
def evaluate(
    model: Decoder, batches: Iterable[Batch], objective: Objective, parallel: Parallel, world: World
) -> dict[str, float]:
    """Means per scored token under `val/`: the objective's terms, `nll`, `kl`, `teacher_nll`, masses, agreement."""
    measured = _measured(objective)
    losses: list[LossSums] = []
    own = {"tokens": 0.0, "teacher_nll": 0.0}
    for batch in tqdm(batches, desc="evaluate", unit="batch", leave=False, mininterval=1, disable=not world.is_first):
        with parallel.autocast(world.device):
            losses.append(batch_loss(model, batch.to(world.device), measured, 1.0))
        own["tokens"] += float(batch.loss_mask.sum())
        own["teacher_nll"] -= float(batch.label_log_prob[batch.loss_mask].double().sum())
    sums = sum_over(losses, measured.sum_names(), world)
    for name in STANDARD:
        sums[name] = sums.pop(f"{name}_loss")
    counted = world.sum_floats(own)
    sums["teacher_nll"] = counted["teacher_nll"]
    return per_token("val", sums, int(counted["tokens"]))
