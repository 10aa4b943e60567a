"""Evaluation of a student on caches of held-out text: the training objective, standard metrics, and a user's metrics.

batches ─► one fused pass ─► sums over positions, batches and ranks ─► metrics under val/ (`compute_metrics`)
"""

import inspect
import math
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from kd_core.errors import UsageError
from kd_core.losses.calibration import GAP_NAMES, TEMPERATURE_NLL_NAMES, best_temperature, calibration_error
from kd_core.losses.fused.loss import LossSums
from kd_core.losses.metric_table import EXTRA_METRIC_SUMS, METRICS
from kd_core.losses.objective import Auxiliary, CacheFacts, CrossEntropy, Distillation, Objective, Term
from kd_core.losses.sparse_view import SparseView
from kd_core.parallel import engine
from kd_core.parallel.config import Parallel
from kd_core.parallel.transfers import device_batches
from kd_core.parallel.world import World
from kd_core.students.student import Student
from kd_core.training.monitoring.metric_log import per_token
from kd_core.training.step import batch_loss, sum_losses
from kd_core.types import Batch

Metric = Callable[[SparseView], Tensor]
"""A user's: of n positions to a number (or a truth) each, [n]; their mean over scored positions is `val/NAME`."""
ADDED_PREFIX = "+"  # marks terms that are not part of the objective, whose own terms may have any other name


@dataclass(frozen=True)
class HeldOutCache:
    """One cache of held-out text.

    `batches` yields this rank's batches, and `facts` decide which terms can be scored. `weight` is the cache's share
    of the pooled metrics. A cache of weight 0 is reported by itself alone.
    """

    batches: Callable[[], Iterable[Batch]]
    facts: CacheFacts
    weight: float = 1.0


@dataclass(frozen=True)
class EvaluationRequest:
    """The measurements of an evaluation: the objective's terms, a user's metrics, and bits per byte.

    `token_bytes` holds how many bytes of text each of the V tokens stands for (int [V]). Bits per byte need it.
    """

    objective: Objective
    metrics: Sequence[Metric] = ()
    token_bytes: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _UserMetric(Term):
    """A user's metric as a term of weight 0."""

    function: Metric

    def values(self, view: SparseView) -> Tensor:
        """Returns the function's value at each position, [n].

        Raises:
            UsageError: the function fails, or does not return one number a position.
        """
        try:
            result = self.function(view)
        except UsageError:
            raise
        except Exception as error:
            error_prefix = f"evaluation.metrics: {self.function.__name__}: {_error_location(self.function, error)}"
            raise UsageError(f"{error_prefix}{type(error).__name__}: {error}") from error
        n = len(view.teacher_tail)
        if not isinstance(result, Tensor) or result.shape != (n,):  # pyright: ignore[reportUnnecessaryIsInstance]
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"evaluation.metrics: {self.function.__name__} gave {got} of {n} positions; wanted a tensor with one "
                "number for each, before any sum."
            )
        return result.detach().to(view.teacher_tail.dtype)


def metric_direction(name: str) -> str | None:
    """Returns "min" if a metric's smallest value is its best, "max" if its largest is, and None if that is unknown."""
    metric = name.rpartition("/")[2]
    if metric in METRICS:
        return METRICS[metric].better
    return "min" if metric.endswith("_loss") else None


def _error_location(function: Metric, error: Exception) -> str:
    """Returns `FILE.py:LINE: ` of the innermost traceback frame in the function's file, or nothing without one."""
    file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", "")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{Path(file).name}:{lines[-1]}: " if lines else ""


def standard_terms(cache: CacheFacts) -> dict[str, Term]:
    """Returns the terms that are scored on every cache of this kind, by name.

    A KL needs the teacher's own log-probabilities, which samples do not hold. They give an unbiased estimate of the
    cross-entropy of teacher and student, which is the KL plus a constant.
    """
    nll = CrossEntropy(weight=0.0)
    if cache.sampled:
        sampled = Distillation(weight=0.0, divergence="cross_entropy", tail="sampled")
        return {"nll": nll, "teacher_cross_entropy": sampled}
    if not cache.tail_known:
        return {"nll": nll, "renormalized_kl": Distillation(weight=0.0, tail="renormalized")}
    # Entries of the whole vocabulary leave no tail: both divergences are exact then.
    is_whole = cache.top_k >= cache.vocab_size
    forward, reverse = ("unnormalized", "renormalized") if is_whole else ("tail_bucket", "tail_bucket")
    return {
        "nll": nll,
        "kl": Distillation(weight=0.0, divergence="forward_kl", tail=forward),
        "reverse_kl": Distillation(weight=0.0, divergence="reverse_kl", tail=reverse),
    }


def _with_added_terms(asked: EvaluationRequest, cache: CacheFacts) -> tuple[Objective, list[str]]:
    """Returns the objective with the standard and the user's terms added, and the names of the added terms.

    Terms of the objective that the cache cannot score are left out. The standard cross-entropy also makes every pass
    one over the whole vocabulary.
    """
    user_terms = {metric.__name__: _UserMetric(weight=0.0, function=metric) for metric in asked.metrics}
    added = {**standard_terms(cache), **user_terms}
    terms = {**asked.objective.fitting(cache), **{f"{ADDED_PREFIX}{name}": term for name, term in added.items()}}
    # Added terms have weight 0, and the objective's may all have been left out. An objective needs one above 0.
    if all(term.weight == 0 or isinstance(term, Auxiliary) for term in terms.values()):
        terms[f"{ADDED_PREFIX}nll"] = CrossEntropy()
    observe = tuple(name for name in EXTRA_METRIC_SUMS if not (cache.sampled and name == "top5_agreement"))
    return replace(asked.objective, terms=terms, observe=observe), list(added)


def compute_metrics(sums: Mapping[str, float], positions: float) -> dict[str, float]:
    """Returns metrics under `val/` from sums over positions: their means, and four that are not means of sums.

    perplexity      e^NLL
    bits_per_byte   NLL in bits, of all scored labels, over the bytes of text that they stand for (special tokens and
                    ids beyond the tokenizer's stand for none)
    ece             expected calibration error, in probability
    temperature     the temperature of the logits with the least NLL: above 1, the student is overconfident
    """
    means = {name: value for name, value in sums.items() if name not in (*GAP_NAMES, *TEMPERATURE_NLL_NAMES, "bytes")}
    metrics = per_token("val", means, positions)
    nll = metrics["val/nll"]
    metrics["val/perplexity"] = math.exp(min(nll, 700.0))  # e^710 overflows a float64
    if "bytes" in sums:
        metrics["val/bits_per_byte"] = sums["nll"] / math.log(2) / max(1.0, sums["bytes"])
    return {
        **metrics,
        "val/ece": calibration_error(sums, positions),
        "val/temperature": best_temperature(sums),
    }


def _sum_metrics(
    model: Student,
    batches: Iterable[Batch],
    cache: CacheFacts,
    asked: EvaluationRequest,
    parallel: Parallel,
    world: World,
) -> tuple[dict[str, float], float]:
    """Returns metric sums over all batches and ranks by name, and the number of scored positions."""
    measured, added_names = _with_added_terms(asked, cache)
    losses: list[LossSums] = []
    local_totals = {"tokens": 0.0, "teacher_nll": 0.0, "bytes": 0.0}
    is_hidden = None if world.is_first else True  # None: tqdm hides the bar if stderr is no terminal
    bar = tqdm(batches, desc="evaluate", unit="batch", leave=False, mininterval=1, disable=is_hidden)

    def counted() -> Generator[Batch]:
        """Counts on the host what needs no pass through the student, so that nobody waits for the device."""
        for batch in bar:
            # Scored positions, and −Σ log p of the teacher at their labels.
            local_totals["tokens"] += float(batch.loss_mask.sum())
            local_totals["teacher_nll"] -= float(batch.label_log_prob[batch.loss_mask].double().sum())
            if asked.token_bytes is not None:
                # Bytes of the scored labels. Ids beyond the tokenizer's table stand for none.
                labels = batch.labels[batch.loss_mask].long()
                local_totals["bytes"] += float(asked.token_bytes[labels[labels < len(asked.token_bytes)]].sum())
            yield batch

    with engine.evaluation(model, parallel, world):
        for batch in device_batches(counted(), world.device):
            losses.append(batch_loss(model, batch, measured, 1.0))
    sums = sum_losses(losses, measured.sum_names(), world)
    # Added terms are reported under their plain names: "+kl_loss" becomes "kl".
    for name in added_names:
        sums[name] = sums.pop(f"{ADDED_PREFIX}{name}_loss")
    totals = world.sum_floats(local_totals)
    if not (tokens := totals.pop("tokens")):
        raise UsageError("evaluation: no position of the held-out cache is scored. Use another cache.")
    if asked.token_bytes is None:
        totals.pop("bytes")
    return sums | totals, tokens


def metric_names(objective: Objective, cache: CacheFacts, metrics: Sequence[Metric] = ()) -> set[str]:
    """Returns the names of the metrics that `evaluate` returns if the bytes of tokens are known."""
    measured, added = _with_added_terms(EvaluationRequest(objective, metrics), cache)
    sums = {*measured.sum_names(), *added, "teacher_nll", "bytes"} - {f"{ADDED_PREFIX}{name}_loss" for name in added}
    return set(compute_metrics(dict.fromkeys(sums, 0.0), 1.0))


def evaluate(
    model: Student,
    batches: Iterable[Batch],
    cache: CacheFacts,
    *,
    asked: EvaluationRequest,
    parallel: Parallel,
    world: World,
) -> dict[str, float]:
    """Returns means per scored token under `val/`, over the batches of all ranks.

    They are the objective's terms that the cache can score, `nll`, `kl`, `reverse_kl` (of samples
    `teacher_cross_entropy`), `teacher_nll`, masses, agreement, and a user's metrics. `compute_metrics` adds four more.
    """
    return compute_metrics(*_sum_metrics(model, batches, cache, asked, parallel, world))


def evaluate_all(
    model: Student, held_out: Mapping[str, HeldOutCache], *, asked: EvaluationRequest, parallel: Parallel, world: World
) -> dict[str, float]:
    """Evaluates several caches as `evaluate` does one: `val/CACHE/…` for each of them, and pooled metrics as `val/…`.

    The pooled metrics are those that all caches of a weight have in common: the weighted average of the caches' means.
    A single cache is reported as `val/…` alone.
    """
    by_cache = {
        name: _sum_metrics(model, cache.batches(), cache.facts, asked, parallel, world)
        for name, cache in held_out.items()
    }
    if len(by_cache) == 1:
        return compute_metrics(*next(iter(by_cache.values())))
    # Rescale cache c's sums by s_c = (w_c / Σ w) · N / n_c, with n_c its positions and N = Σ n_c over weighted caches.
    # Then Σ s_c · sum_c / N = Σ (w_c / Σ w) · mean_c.
    weights = {name: cache.weight for name, cache in held_out.items() if cache.weight}
    positions, total = sum(by_cache[name][1] for name in weights), sum(weights.values())
    scale = {name: weight / total * positions / by_cache[name][1] for name, weight in weights.items()}
    common = set.intersection(*(set(by_cache[name][0]) for name in weights))
    pooled = {metric: sum(scale[name] * by_cache[name][0][metric] for name in weights) for metric in sorted(common)}
    metrics = compute_metrics(pooled, positions)
    for name, (sums, count) in by_cache.items():
        metrics |= {key.replace("val/", f"val/{name}/"): value for key, value in compute_metrics(sums, count).items()}
    return metrics
