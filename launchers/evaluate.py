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
from collections.abc import Mapping
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
    from experiments.base.measure import measure_model
    from experiments.config.saved_students import find_student, load_student, recorded_precision
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
        chosen = world.run_on_first(lambda: choose_precision(precision, world.device, recorded_precision(student)))
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
