"""A student against a teacher's cache: the training objective, and always NLL, KL to the teacher and agreement."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from tqdm import tqdm

from kd_core.losses.fused import LossSums
from kd_core.losses.objective import CacheFacts, CrossEntropy, Distillation, Objective, Term
from kd_core.parallel.mesh import World
from kd_core.parallel.plan import Parallel
from kd_core.parallel.sharding import let_go
from kd_core.students.decoder import Decoder
from kd_core.training.metrics import per_token
from kd_core.training.step import batch_loss, sum_over
from kd_core.types import Batch


def standard_terms(cache: CacheFacts) -> dict[str, Term]:
    """Scored on every cache. Samples give no KL, which needs the teacher's own log-probabilities, but its unbiased
    cross-entropy with the student: the KL plus a constant."""
    if cache.sampled:
        return {
            "nll": CrossEntropy(weight=0.0),
            "teacher_cross_entropy": Distillation(weight=0.0, divergence="cross_entropy", tail="sampled"),
        }
    if not cache.tail_known:
        return {"nll": CrossEntropy(weight=0.0), "renormalized_kl": Distillation(weight=0.0, tail="renormalized")}
    tail = "tail_bucket" if cache.top_k < cache.vocab_size else "unnormalized"
    return {"nll": CrossEntropy(weight=0.0), "kl": Distillation(weight=0.0, divergence="forward_kl", tail=tail)}


def _measured(objective: Objective, cache: CacheFacts) -> Objective:
    """With the standard terms, whose cross-entropy also makes every pass one over the whole vocabulary."""
    terms = {**objective.fitting(cache), **standard_terms(cache)}
    # Weights of terms that do not fit are gone, and those of the standard ones are 0: one must be more.
    if all(term.weight == 0 for term in terms.values()):
        terms["nll"] = CrossEntropy()
    return replace(objective, terms=terms, observe=("student_entropy",))


def metric_names(objective: Objective, cache: CacheFacts) -> set[str]:
    """Names of what `evaluate` returns."""
    terms = standard_terms(cache)
    standard = {f"{name}_loss" for name in terms}
    sums = (name for name in _measured(objective, cache).sum_names() if name not in standard)
    return {f"val/{name}" for name in (*sums, *terms, "teacher_nll", "tokens")}


@torch.no_grad()
def evaluate(
    model: Decoder,
    batches: Iterable[Batch],
    cache: CacheFacts,
    *,
    objective: Objective,
    parallel: Parallel,
    world: World,
) -> dict[str, float]:
    """Means per scored token under `val/`: the objective's terms that the cache can score, `nll`, `kl` (of samples
    `teacher_cross_entropy`), `teacher_nll`, masses, agreement."""
    measured = _measured(objective, cache)
    losses: list[LossSums] = []
    own = {"tokens": 0.0, "teacher_nll": 0.0}
    for batch in tqdm(batches, desc="evaluate", unit="batch", leave=False, mininterval=1, disable=not world.is_first):
        with parallel.autocast(world.device):
            losses.append(batch_loss(model, batch.to(world.device), measured, 1.0))
        own["tokens"] += float(batch.loss_mask.sum())
        own["teacher_nll"] -= float(batch.label_log_prob[batch.loss_mask].double().sum())
    let_go(model)
    sums = sum_over(losses, measured.sum_names(), world)
    for name in standard_terms(cache):
        sums[name] = sums.pop(f"{name}_loss")
    counted = world.sum_floats(own)
    sums["teacher_nll"] = counted["teacher_nll"]
    return per_token("val", sums, int(counted["tokens"]))
