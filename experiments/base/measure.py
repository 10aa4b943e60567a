"""Metrics of a student on teacher caches, outside of a run."""

from collections.abc import Sequence
from pathlib import Path

from data.stream.collate import Collate
from data.stream.source import Shards
from data.stream.stream import all_batches
from data.tokenizer import Tokenizer
from experiments.base.checks import refuse_taken_names
from experiments.base.parts import cache_facts
from kd_core.losses.metric_table import METRICS
from kd_core.losses.objective import CrossEntropy, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.precision import Precision
from kd_core.students.student import Student
from kd_core.training.evaluation import EvaluationRequest, Metric, evaluate


def measure_model(
    model: Student,
    tokenizer_folder: Path,
    caches: Sequence[str],
    precision: Precision,
    world: World,
    metrics: Sequence[Metric] = (),
) -> dict[str, dict[str, float]]:
    """Returns, by cache, the metrics of `metric_table` and the user's metrics by name, for a model in memory.

    Raises:
        UsageError: a cache cannot be read or has another vocabulary. This is checked before any is measured.
    """
    opened, tokenizer = {cache: Shards(cache) for cache in caches}, Tokenizer(tokenizer_folder)
    for shards in opened.values():
        shards.check(model.arch.vocab_size, tokenizer.fingerprint_like(shards.manifest.tokenizer))
    # The objective is a plain one, so that no metric depends on how the student was trained.
    parallel, objective = Parallel(precision=precision), Objective({"sft": CrossEntropy()})
    refuse_taken_names(metrics, objective, opened.values())
    asked = EvaluationRequest(objective, metrics, tokenizer.byte_lengths())
    names = [*(name for name in METRICS if name != "loss"), *(metric.__name__ for metric in metrics)]

    def measure(shards: Shards) -> dict[str, float]:
        collate = Collate(shards.manifest.row_length)
        batches = all_batches(
            shards, collate, micro_batch=parallel.micro_batch_rows, rank=world.rank, ranks=world.size,
            vocab_size=model.arch.vocab_size,
        )  # fmt: skip
        all_metrics = evaluate(model, batches, cache_facts(shards), asked=asked, parallel=parallel, world=world)
        return {name: all_metrics[f"val/{name}"] for name in names if f"val/{name}" in all_metrics}

    return {cache: measure(shards) for cache, shards in opened.items()}
