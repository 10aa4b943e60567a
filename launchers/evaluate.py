"""Measure a model against a teacher's caches, over every position of them.

    python -m launchers.evaluate --student=runs/quickstart --cache=quickstart/cache/validation
    python -m launchers.evaluate --student=runs/quickstart --step=30 --cache=quickstart/cache/validation
    python -m launchers.evaluate --student=quickstart/teacher --cache=quickstart/cache/validation
    python -m launchers.evaluate --student=runs/a --cache=news/validation --cache=code/validation --metric=mine.py:surer

Prints NLL, perplexity, bits per byte, both KLs with the tail bucket (nats per token), agreement, what a speculative
decoder would accept, calibration, and the mass that teacher and student put on the teacher's entries, a column a
cache. --metric adds the mean of a function of your own, from a SparseView of n positions to a number each. --json
prints one JSON object instead (of several caches, one by each cache's name).
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
    "What matmuls multiply in; auto: as the run did, else what this device does well. Name one to compare machines.",
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
SHOWN = {
    "nll": "NLL, nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "teacher_nll": "teacher's NLL",
    "kl": "KL(teacher‖student), nats per token",
    "reverse_kl": "KL(student‖teacher), nats per token",
    "renormalized_kl": "KL on the teacher's entries alone, nats per token",
    "teacher_cross_entropy": "cross-entropy to the teacher's samples, nats",
    "top1_agreement": "likeliest token is the teacher's",
    "top5_agreement": "likeliest token is among the teacher's five",
    "acceptance": "Σ min(p, q) on the entries (accepted, at least)",
    "student_entropy": "student's entropy, nats",
    "teacher_entropy": "teacher's entropy (at least), nats",
    "student_mass": "student mass on the teacher's entries",
    "teacher_mass": "teacher mass on them",
    "ece": "expected calibration error",
    "temperature": "temperature that would mend it",
    "tokens": "positions",
}


def _recorded_precision(path: Path) -> str | None:
    """Returns the precision of the run that a folder of a run, an export or a checkpoint belongs to, if any."""
    from kd_core.training.run_folder import RunFolder

    whole = path.absolute()
    if whole.name == "export":
        return RunFolder(whole.parent).precision()
    return RunFolder(whole.parents[1] if whole.parent.name == "checkpoints" else whole).precision()


def measure_model(
    model: Any,
    tokenizer_folder: Path,
    caches: Sequence[str],
    precision: "Precision",
    world: Any,
    metrics: Sequence[Any] = (),
) -> dict[str, dict[str, float]]:
    """By cache, the numbers of `SHOWN`, and of a user's metrics by their names, for a model in memory.

    Raises:
        UsageError: a cache that cannot be read or is of another vocabulary, before any is measured.
    """
    from data.stream.collate import Collate
    from data.stream.source import Shards
    from data.stream.stream import all_batches
    from data.tokenizer import Tokenizer
    from experiments.base.checks import cache_facts, refuse_taken_names
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
        found = evaluate(model, batches, cache_facts(shards), asked=asked, parallel=parallel, world=world)
        names = [*SHOWN, *(metric.__name__ for metric in metrics)]
        return {name: found[f"val/{name}"] for name in names if f"val/{name}" in found}

    return {cache: measured(shards) for cache, shards in opened.items()}


def _user_metrics() -> list[Any]:
    from experiments.config import user_code

    wanted = "FILE.py:NAME"
    return [user_code.load_from_file(text, f"--metric={text}", wanted).load() for text in METRIC.value]


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A row a number, a column a cache; the caches' names where there are several."""
    from launchers.reports.text_tables import aligned

    def cell(name: str, numbers: Mapping[str, float]) -> str:
        return "" if name not in numbers else f"{numbers[name]:.0f}" if name == "tokens" else f"{numbers[name]:.5f}"

    known = {name for numbers in found.values() for name in numbers}
    names = [name for name in SHOWN if name in known] + sorted(known - SHOWN.keys())
    rows = [[SHOWN.get(name, name), *(cell(name, numbers) for numbers in found.values())] for name in names]
    if len(found) == 1:
        return aligned(["", ""], rows).split("\n", 1)[1]
    return aligned(["", *found], rows)


def main() -> None:
    """Measure and print."""
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
        wanted = cast("Precision", PRECISION.value)
        chosen = world.run_on_first(lambda: choose_precision(wanted, world.device, _recorded_precision(student)))
        chosen.warn_if_slow("--precision")
        caches = list(dict.fromkeys(CACHE.value))
        found = measure_model(model, tokenizer_folder, caches, chosen.precision, world, metrics)
    app.log.info("precision: %s", chosen)
    if world.is_first:
        print((json.dumps(found if len(found) > 1 else found[caches[0]])) if JSON.value else table(found))


if __name__ == "__main__":
    app.start(main, "launchers.evaluate", __doc__ or "")
