"""Measure a model against a teacher's cache, over every position of it.

    python -m launchers.evaluate --student=runs/quickstart/export --cache=quickstart/cache/validation
    python -m launchers.evaluate --student=runs/quickstart/checkpoints/step_00000030 --cache=quickstart/cache/validation
    python -m launchers.evaluate --student=quickstart/teacher --cache=quickstart/cache/validation

Prints NLL, perplexity, bits per byte, both KLs with the tail bucket (nats per token), agreement, what a speculative
decoder would accept, calibration, and the mass that teacher and student put on the teacher's entries. --json prints
one JSON object instead.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from launchers import app

STUDENT = flags.DEFINE_string("student", None, "Hugging Face folder, or a checkpoint of a run; required.")
CACHE = flags.DEFINE_string("cache", None, "Folder or URL of a teacher's cache; required.")
PRECISION = flags.DEFINE_string("precision", "float32", "What matmuls multiply in: float32 or bfloat16.")
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


def load_student(path: Path, device: Any) -> tuple[Any, Path]:
    """A model and the folder of its tokenizer, from a Hugging Face folder or a checkpoint of a run."""
    import fiddle as fdl

    from kd_core.students.starts import Pretrained, build
    from kd_core.training import checkpoint
    from launchers.config_items import load_record

    if not (path / "progress.json").exists():
        return build(Pretrained(str(path)), device, seed=0), path
    start: Any = fdl.build(load_record(path / "config.json").student)
    model = build(start, device, seed=0)
    checkpoint.load_model(path, model)
    return model, Path(start.folder)


def measure_model(
    model: Any, tokenizer_folder: Path, cache: Path | str, precision: str, world: Any
) -> dict[str, float]:
    """The numbers of `SHOWN` for a model in memory."""
    from data.stream.collate import Collate
    from data.stream.source import Shards
    from data.stream.stream import all_batches
    from data.tokenizer import Tokenizer
    from experiments.checks import cache_facts
    from kd_core.losses.objective import CrossEntropy, Objective
    from kd_core.parallel.plan import Parallel
    from kd_core.training.evaluation import Asked, evaluate

    shards, tokenizer = Shards(str(cache)), Tokenizer(tokenizer_folder)
    shards.check(model.arch.vocab_size, tokenizer.fingerprint())
    parallel, collate = Parallel(precision=precision), Collate(shards.manifest.row_length)
    share = {"rank": world.rank, "ranks": world.size}
    batches = all_batches(shards, collate, micro_batch=parallel.micro_batch_rows, **share)
    asked = Asked(Objective({"sft": CrossEntropy()}), token_bytes=tokenizer.byte_lengths())
    found = evaluate(model, batches, cache_facts(shards), asked=asked, parallel=parallel, world=world)
    return {name: found[f"val/{name}"] for name in SHOWN if f"val/{name}" in found}


def main() -> None:
    """Measure and print."""
    from kd_core.errors import UsageError
    from kd_core.parallel.mesh import joined_world

    if STUDENT.value is None or CACHE.value is None:
        raise UsageError("wanted --student=DIR and --cache=DIR.")
    with joined_world() as world:
        model, tokenizer_folder = load_student(Path(STUDENT.value), world.device)
        found = measure_model(model, tokenizer_folder, CACHE.value, PRECISION.value, world)
    if not world.is_first:
        return
    if JSON.value:
        print(json.dumps(found))
        return
    for name, words in ((name, words) for name, words in SHOWN.items() if name in found):
        print(f"{words:<48} {found[name]:>12.5f}" if name != "tokens" else f"{words:<48} {found[name]:>12.0f}")


if __name__ == "__main__":
    app.start(main, "launchers.evaluate", __doc__ or "")
