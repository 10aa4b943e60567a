"""A student against caches of held-out text: the training objective, what is always measured, and a user's metrics.

batches ─► one fused pass ─► sums over positions, batches and ranks ─► numbers under val/ (`finished`)
"""

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kd_core.errors import UsageError
from kd_core.losses.calibration import AT_TEMPERATURES, GAPS, best_temperature, calibration_error
from kd_core.losses.fused.loss import LossSums
from kd_core.losses.objective import OBSERVED, CacheFacts, CrossEntropy, Distillation, Objective, Term
from kd_core.losses.sparse_view import SparseView
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import let_go
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.training.monitoring.metric_log import per_token
from kd_core.training.step import batch_loss, sum_over
from kd_core.types import Batch

Metric = Callable[[SparseView], Tensor]
"""A user's: of n positions to a number (or a truth) each, [n]; their mean over scored positions is `val/NAME`."""
HIGHER_IS_BETTER = ("top1_agreement", "top5_agreement", "acceptance")
LOWER_IS_BETTER = (
    "loss", "nll", "kl", "reverse_kl", "renormalized_kl", "teacher_cross_entropy", "perplexity", "bits_per_byte", "ece"
)  # fmt: skip
ADDED = "+"  # begins the names of terms that are no part of the objective, which may have terms of any other name


@dataclass(frozen=True)
class HeldOut:
    """A cache of held-out text: this rank's batches of it, what can be scored, and its share beside other caches
    (0: it is reported by itself alone)."""

    batches: Callable[[], Iterable[Batch]]
    facts: CacheFacts
    weight: float = 1.0


@dataclass(frozen=True)
class Asked:
    """What is measured: the objective's terms, a user's functions, and bits per byte where the bytes that each of V
    tokens stands for are known (int [V])."""

    objective: Objective
    metrics: Sequence[Metric] = ()
    token_bytes: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Users(Term):
    """A user's metric as a term of no weight."""

    function: Metric

    def values(self, view: SparseView) -> Tensor:
        """What the function gives.

        Raises:
            UsageError: it fails, or is not one number a position.
        """
        try:
            found = self.function(view)
        except UsageError:
            raise
        except Exception as error:
            said = f"evaluation.metrics: {self.function.__name__}: {_line_of(self.function, error)}"
            raise UsageError(f"{said}{type(error).__name__}: {error}") from error
        n = len(view.teacher_tail)
        if not isinstance(found, Tensor) or found.shape != (n,):  # pyright: ignore[reportUnnecessaryIsInstance]
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"evaluation.metrics: {self.function.__name__} gave {got} of {n} positions; wanted a tensor of one "
                "number each, before any sum."
            )
        return found.detach().to(view.teacher_tail.dtype)


def best_is(name: str) -> str | None:
    """Whether the smallest ("min") or the largest ("max") is the best of a number's values; None: nobody knows."""
    last = name.rpartition("/")[2]
    if last in HIGHER_IS_BETTER:
        return "max"
    return "min" if last in LOWER_IS_BETTER or last.endswith("_loss") else None


def _line_of(function: Metric, error: Exception) -> str:
    """`FILE.py:LINE: `, the innermost of the function's own file; nothing where it has none."""
    file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", "")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{Path(file).name}:{lines[-1]}: " if lines else ""


def standard_terms(cache: CacheFacts) -> dict[str, Term]:
    """Scored on every cache. Samples give no KL, which needs the teacher's own log-probabilities, but its unbiased
    cross-entropy with the student: the KL plus a constant."""
    nll = CrossEntropy(weight=0.0)
    if cache.sampled:
        sampled = Distillation(weight=0.0, divergence="cross_entropy", tail="sampled")
        return {"nll": nll, "teacher_cross_entropy": sampled}
    if not cache.tail_known:
        return {"nll": nll, "renormalized_kl": Distillation(weight=0.0, tail="renormalized")}
    whole = cache.top_k >= cache.vocab_size  # both are exact then
    forward, reverse = ("unnormalized", "renormalized") if whole else ("tail_bucket", "tail_bucket")
    return {
        "nll": nll,
        "kl": Distillation(weight=0.0, divergence="forward_kl", tail=forward),
        "reverse_kl": Distillation(weight=0.0, divergence="reverse_kl", tail=reverse),
    }


def _measured(asked: Asked, cache: CacheFacts) -> tuple[Objective, list[str]]:
    """With the standard terms, whose cross-entropy also makes every pass one over the whole vocabulary, and the user's;
    and the names of both."""
    users = {metric.__name__: _Users(weight=0.0, function=metric) for metric in asked.metrics}
    added = {**standard_terms(cache), **users}
    terms = {**asked.objective.fitting(cache), **{f"{ADDED}{name}": term for name, term in added.items()}}
    # Weights of terms that do not fit are gone, and those of the standard ones are 0: one must be more.
    if all(term.weight == 0 for term in terms.values()):
        terms[f"{ADDED}nll"] = CrossEntropy()
    observe = tuple(name for name in OBSERVED if not (cache.sampled and name == "top5_agreement"))
    return replace(asked.objective, terms=terms, observe=observe), list(added)


def finished(sums: Mapping[str, float], positions: float) -> dict[str, float]:
    """Sums over positions as numbers under `val/`: means, and what is no mean of the kind.

    perplexity      e^NLL
    bits_per_byte   NLL in bits, of all scored labels, over the bytes of text that they stand for; special tokens and
                    ids beyond the tokenizer's stand for none
    ece             expected calibration error, in probability
    temperature     of the logits, at which the NLL would be least: above 1, the student is surer than it is right
    """
    means = {name: value for name, value in sums.items() if name not in (*GAPS, *AT_TEMPERATURES, "bytes")}
    numbers = per_token("val", means, positions)
    nll = numbers["val/nll"]
    numbers["val/perplexity"] = math.exp(min(nll, 700.0))  # beyond, no float holds it
    if "bytes" in sums:
        numbers["val/bits_per_byte"] = sums["nll"] / math.log(2) / max(1.0, sums["bytes"])
    return {
        **numbers,
        "val/ece": calibration_error(sums, positions),
        "val/temperature": best_temperature(sums),
    }


@torch.no_grad()
def _sums(
    model: Decoder, batches: Iterable[Batch], cache: CacheFacts, asked: Asked, parallel: Parallel, world: World
) -> tuple[dict[str, float], float]:
    """Of all batches and ranks, by name; and how many positions they are of."""
    measured, added = _measured(asked, cache)
    losses: list[LossSums] = []
    own = {"tokens": 0.0, "teacher_nll": 0.0, "bytes": 0.0}
    hidden = None if world.is_first else True  # None: where stderr is no terminal
    shown = tqdm(batches, desc="evaluate", unit="batch", leave=False, mininterval=1, disable=hidden)
    with parallel.autocast(world.device):  # around all batches: each parameter is rounded once
        for batch in shown:
            losses.append(batch_loss(model, batch.to(world.device), measured, 1.0))
            own["tokens"] += float(batch.loss_mask.sum())
            own["teacher_nll"] -= float(batch.label_log_prob[batch.loss_mask].double().sum())
            if asked.token_bytes is not None:
                labels = batch.labels[batch.loss_mask].long()
                own["bytes"] += float(asked.token_bytes[labels[labels < len(asked.token_bytes)]].sum())
    let_go(model)
    sums = sum_over(losses, measured.sum_names(), world)
    for name in added:
        sums[name] = sums.pop(f"{ADDED}{name}_loss")
    counted = world.sum_floats(own)
    if not (tokens := counted.pop("tokens")):
        raise UsageError("evaluation: no position of the held-out cache is scored. Take another cache.")
    if asked.token_bytes is None:
        counted.pop("bytes")
    return sums | counted, tokens


def metric_names(objective: Objective, cache: CacheFacts, metrics: Sequence[Metric] = ()) -> set[str]:
    """Names of what `evaluate` returns where the bytes of tokens are known."""
    measured, added = _measured(Asked(objective, metrics), cache)
    sums = {*measured.sum_names(), *added, "teacher_nll", "bytes"} - {f"{ADDED}{name}_loss" for name in added}
    return set(finished(dict.fromkeys(sums, 0.0), 1.0))


def evaluate(
    model: Decoder, batches: Iterable[Batch], cache: CacheFacts, *, asked: Asked, parallel: Parallel, world: World
) -> dict[str, float]:
    """Means per scored token under `val/`: the objective's terms that the cache can score, `nll`, `kl`, `reverse_kl`
    (of samples `teacher_cross_entropy`), `teacher_nll`, masses, agreement, a user's metrics, and what `finished` adds.
    """
    return finished(*_sums(model, batches, cache, asked, parallel, world))


def evaluate_all(
    model: Decoder, held_out: Mapping[str, HeldOut], *, asked: Asked, parallel: Parallel, world: World
) -> dict[str, float]:
    """As `evaluate`, over several caches: `val/CACHE/…` for each, and `val/…` of what all that have a weight have, with
    each cache's mean counted by it. One cache alone needs no name."""
    found = {name: _sums(model, each.batches(), each.facts, asked, parallel, world) for name, each in held_out.items()}
    if len(found) == 1:
        return finished(*next(iter(found.values())))
    weights = {name: each.weight for name, each in held_out.items() if each.weight}
    positions, total = sum(found[name][1] for name in weights), sum(weights.values())
    share = {name: weight / total * positions / found[name][1] for name, weight in weights.items()}
    common = set.intersection(*(set(found[name][0]) for name in weights))
    pooled = {each: sum(share[name] * found[name][0][each] for name in weights) for each in sorted(common)}
    numbers = finished(pooled, positions)
    for name, (sums, count) in found.items():
        numbers |= {key.replace("val/", f"val/{name}/"): value for key, value in finished(sums, count).items()}
    return numbers
