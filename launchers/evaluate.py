"""Measure a model against a teacher's caches, over every position of them.

    python -m launchers.evaluate --student=runs/quickstart --cache=quickstart/cache/validation
    python -m launchers.evaluate --student=runs/quickstart --step=30 --cache=quickstart/cache/validation
    python -m launchers.evaluate --student=quickstart/teacher --cache=quickstart/cache/validation
    python -m launchers.evaluate --student=runs/a --cache=news/validation --cache=code/validation --metric=mine.py:surer

Prints a column per cache: NLL, perplexity, bits per byte, both KLs with the tail bucket (nats per token), agreement,
acceptance by a speculative decoder, calibration, and the mass of teacher and student on the teacher's entries.
--metric adds the mean of your own function, which maps a SparseView of n positions to n numbers. --json prints one JSON
object instead, which for several caches holds one object per cache by its name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from absl import flags

from launchers.cli import app

if TYPE_CHECKING:
    from kd_core.precision import Precision

STUDENT = flags.DEFINE_string(
    "student", None, "Hugging Face folder or hub:OWNER/NAME, a run, or a checkpoint of a run; required."
)
STEP = flags.DEFINE_string("step", None, "Of a run: best, last, or a number; default its export/.")
CACHE = flags.DEFINE_multi_string("cache", [], "Folder or URL of a teacher's cache; at least one.")
METRIC = flags.DEFINE_multi_string("metric", [], "FILE.py:NAME: a function of a SparseView, as in evaluation.metrics.")
PRECISION = flags.DEFINE_enum(
    "precision",
    "auto",
    ["auto", "float32", "bfloat16"],
    "Precision of matmuls; auto: that of the run, else what suits this device. Name one to compare machines.",
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def _recorded_precision(path: Path) -> str | None:
    """Returns the recorded precision of the run that a run, export or checkpoint folder belongs to, if any."""
    from kd_core.training.run_folder import RunFolder

    folder = path.absolute()
    if folder.name == "export":
        return RunFolder(folder.parent).precision()
    return RunFolder(folder.parents[1] if folder.parent.name == "checkpoints" else folder).precision()


def measure_model(
    model: Any,
    tokenizer_folder: Path,
    caches: Sequence[str],
    precision: "Precision",
    world: Any,
    metrics: Sequence[Any] = (),
) -> dict[str, dict[str, float]]:
    """Returns, by cache, the metrics of `metric_table` and the user's metrics by name, for a model in memory.

    Raises:
        UsageError: a cache cannot be read or has another vocabulary. This is checked before any is measured.
    """
    from data.stream.collate import Collate
    from data.stream.source import Shards
    from data.stream.stream import all_batches
    from data.tokenizer import Tokenizer
    from experiments.base.checks import cache_facts, refuse_taken_names
    from kd_core.losses.metric_table import METRICS
    from kd_core.losses.objective import CrossEntropy, Objective
    from kd_core.parallel.config import Parallel
    from kd_core.training.evaluation import EvaluationRequest, evaluate

    opened, tokenizer = {cache: Shards(cache) for cache in caches}, Tokenizer(tokenizer_folder)
    for shards in opened.values():
        shards.check(model.arch.vocab_size, tokenizer.fingerprint_like(shards.manifest.tokenizer))
    parallel, objective = Parallel(precision=precision), Objective({"sft": CrossEntropy()})
    refuse_taken_names(metrics, objective, opened.values())
    asked = EvaluationRequest(objective, metrics, tokenizer.byte_lengths())

    def measured(shards: Shards) -> dict[str, float]:
        collate = Collate(shards.manifest.row_length)
        share = {"rank": world.rank, "ranks": world.size, "vocab_size": model.arch.vocab_size}
        batches = all_batches(shards, collate, micro_batch=parallel.micro_batch_rows, **share)
        all_metrics = evaluate(model, batches, cache_facts(shards), asked=asked, parallel=parallel, world=world)
        names = [*(name for name in METRICS if name != "loss"), *(metric.__name__ for metric in metrics)]
        return {name: all_metrics[f"val/{name}"] for name in names if f"val/{name}" in all_metrics}

    return {cache: measured(shards) for cache, shards in opened.items()}


def _user_metrics() -> list[Any]:
    from experiments.config import user_code

    expected_form = "FILE.py:NAME"
    return [user_code.load_from_file(text, f"--metric={text}", expected_form).load() for text in METRIC.value]


def format_table(metrics_by_cache: Mapping[str, Mapping[str, float]]) -> str:
    """Formats a row per metric and a column per cache. Several caches get a header with their names."""
    from kd_core.losses.metric_table import METRICS
    from launchers.reports.text_tables import format_aligned

    def cell(name: str, numbers: Mapping[str, float]) -> str:
        return "" if name not in numbers else f"{numbers[name]:.0f}" if name == "tokens" else f"{numbers[name]:.5f}"

    measured_names = {name for numbers in metrics_by_cache.values() for name in numbers}
    titles = {name: ", ".join(part for part in (row.title, row.unit) if part) for name, row in METRICS.items()}
    names = [name for name in titles if name in measured_names] + sorted(measured_names - titles.keys())
    rows = [[titles.get(name, name), *(cell(name, numbers) for numbers in metrics_by_cache.values())] for name in names]
    if len(metrics_by_cache) == 1:
        return format_aligned(["", ""], rows).split("\n", 1)[1]
    return format_aligned(["", *metrics_by_cache], rows)


def main() -> None:
    """Measures the student on all caches, and prints the table or the JSON."""
    from experiments.config.saved_students import find_student, load_student
    from kd_core.errors import UsageError
    from kd_core.hub import resolve_folder
    from kd_core.parallel.world import joined_world
    from kd_core.precision import choose_precision

    if STUDENT.value is None or not CACHE.value:
        raise UsageError("wanted --student=DIR and --cache=DIR.")
    metrics = _user_metrics()
    with joined_world() as world:
        student = find_student(resolve_folder(STUDENT.value, "--student"), STEP.value)
        model, tokenizer_folder = load_student(student, world.device)
        precision = cast("Precision", PRECISION.value)
        chosen = world.run_on_first(lambda: choose_precision(precision, world.device, _recorded_precision(student)))
        chosen.warn_if_slow("--precision")
        caches = list(dict.fromkeys(CACHE.value))
        metrics_by_cache = measure_model(model, tokenizer_folder, caches, chosen.precision, world, metrics)
    app.log.info("precision: %s", chosen)
    if world.is_first:
        print(
            (json.dumps(metrics_by_cache if len(metrics_by_cache) > 1 else metrics_by_cache[caches[0]]))
            if JSON.value
            else format_table(metrics_by_cache)
        )


if __name__ == "__main__":
    app.run_command(main, "launchers.evaluate", __doc__ or "")
