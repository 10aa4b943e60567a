"""Measure which layers of a teacher matter on your text, to start a student from those alone.

    python -m launchers.importance --teacher=quickstart/teacher --cache=quickstart/cache/train --keep=15
    python -m launchers.importance --teacher=my/teacher --text=my/corpus.txt --keep=16 --tokens=8192 --measure=influence

Prints a table of all layers, and the setting for an experiment that keeps the best of them:

    --config='student.keep_layers=(0, 1, 8, …)'

--measure is one of

    greedy       default: drops the layer without which the NLL is lowest, and repeats this with the layers that
                 remain. It is the best measure and the most expensive, at about layers² / 4 passes.
    alone        the rise of the NLL without each single layer, at one pass per layer
    influence    1 − cosine of a layer's input and output (ShortGPT), at one pass in all

launchers.prune makes a student narrower as well. --out also writes all numbers as JSON. The text is the first --tokens
of a cache's records, or of a text file, in rows of --row_length.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from absl import flags

from launchers.cli import app
from launchers.cli.measured_text import read_rows

TEACHER = flags.DEFINE_string(
    "teacher", None, "Hugging Face folder of the model to measure, or hub:OWNER/NAME; required."
)
CACHE = flags.DEFINE_string("cache", None, "A teacher's cache whose text is used; or --text.")
TEXT = flags.DEFINE_string("text", None, "A text file; or --cache.")
KEEP = flags.DEFINE_integer("keep", None, "How many layers to keep; default half of them.", lower_bound=1)
MEASURE = flags.DEFINE_enum("measure", "greedy", ["greedy", "alone", "influence"], "How; see above.")
TOKENS = flags.DEFINE_integer("tokens", 2048, "How many tokens to measure on.", lower_bound=2)
ROW_LENGTH = flags.DEFINE_integer(
    "row_length", None, "Tokens of a row; default 256, or less where the documents are shorter.", lower_bound=2
)
DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of matmuls; auto: what suits this device."
)
OUT = flags.DEFINE_string("out", None, "A JSON file for all numbers.")


def _print_tables(
    scores: Sequence[float], kept_layers: tuple[int, ...], tokens: int, nll_by_layers: Mapping[str, float]
) -> None:
    score_titles = {
        "greedy": "order of dropping (highest: kept)",
        "alone": "rise of NLL without it",
        "influence": "influence",
    }
    print(f"layer  {score_titles[MEASURE.value or '']}")
    for layer, score in enumerate(scores):
        print(f"{layer:>5}  {score:<8.4g} {'kept' if layer in kept_layers else ''}".rstrip())
    print(f"\nNLL on {tokens} tokens, nats per token, before any training:")
    for name, nll in nll_by_layers.items():
        print(f"  {name:<22} {nll:.3f}")
    print(f"\n--config='student.keep_layers={kept_layers}'")


def main() -> None:
    """Loads the teacher, measures its layers, and prints the table."""
    import torch

    from data.tokenizer import Tokenizer
    from kd_core.errors import UsageError
    from kd_core.files import write_json
    from kd_core.hub import local_folder
    from kd_core.precision import DTYPES, Precision, choose_precision
    from kd_core.students.layer_importance import LayerwiseText, Measure, choose_layers, nll_with_layers
    from kd_core.students.starts.start import Pretrained, build_student

    if TEACHER.value is None:
        raise UsageError("wanted --teacher=DIR. Try --help.")
    teacher = local_folder(TEACHER.value, "--teacher")
    rows = read_rows(teacher, CACHE.value, TEXT.value, ROW_LENGTH.value, TOKENS.value or 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_precision(cast(Precision, DTYPE.value), device)
    app.log.info("dtype: %s", chosen)
    chosen.warn_if_slow("--dtype")
    vocab_size = Tokenizer(teacher).vocab_size
    model = build_student(Pretrained(str(teacher)), device, 0, vocab_size, DTYPES[chosen.precision]).eval()
    count = model.arch.num_layers
    keep = KEEP.value or count // 2
    if not 0 < keep < count:
        raise UsageError(f"--keep={keep}: wanted 1 to {count - 1}, for {teacher} has {count} layers.")
    with torch.no_grad():
        text = LayerwiseText(model, rows.to(device))
    measure = cast(Measure, MEASURE.value)
    scores, kept_layers = choose_layers(
        text, measure, keep, lambda drop: app.log.info("without layer %d too: NLL %.3f", drop.layer, drop.nll)
    )
    evenly_spaced = tuple(round(i * (count - 1) / max(1, keep - 1)) for i in range(keep))
    nll_by_layers = {
        f"all {count} layers": nll_with_layers(text, range(count)),
        f"the {keep} kept": nll_with_layers(text, kept_layers),
        f"{keep} evenly spaced": nll_with_layers(text, evenly_spaced),
    }
    _print_tables(scores, kept_layers, rows.numel(), nll_by_layers)
    if OUT.value:
        write_json(
            Path(OUT.value),
            {"measure": measure, "keep_layers": kept_layers, "scores": scores, "nll": nll_by_layers},
        )


if __name__ == "__main__":
    app.run_command(main, "launchers.importance", __doc__ or "")
