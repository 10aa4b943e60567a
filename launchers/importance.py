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

--out also writes all numbers as JSON. The text is the first --tokens of a cache's records, or of a text file, in rows
of --row_length.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from absl import flags

from launchers.cli import app

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
LENGTHS = (256, 128, 64, 32, 16, 8, 4, 2)
DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of matmuls; auto: what suits this device."
)
OUT = flags.DEFINE_string("out", None, "A JSON file for all numbers.")


def _documents(teacher: Path) -> Iterator[list[int]]:
    """Yields the tokens of the text, one document at a time."""
    from data.tokenizer import Tokenizer
    from kd_core.errors import UsageError

    if (CACHE.value is None) == (TEXT.value is None):
        raise UsageError("wanted either --cache=DIR or --text=FILE.")
    tokenizer = Tokenizer(teacher)
    if TEXT.value is not None:
        try:
            text = Path(TEXT.value).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"--text={TEXT.value}: not UTF-8 text ({error}).") from None
        yield [*tokenizer.around().begins, *tokenizer.encode([text])[0]]
        return
    from data.cache.manifest import read_manifest
    from data.stream.shards import ShardReader

    folder = Path(CACHE.value or "")
    manifest = read_manifest(folder)
    if manifest.tokenizer != tokenizer.fingerprint_like(manifest.tokenizer):
        raise UsageError(f"{folder}: was made with another tokenizer than that of {teacher}. Name its own teacher.")
    for record in ShardReader(folder, manifest).records():
        yield record.token_ids.tolist()


def _rows(teacher: Path) -> Any:
    """Returns token ids, [B, S], where each row is a piece of one document."""
    import torch

    from kd_core.errors import UsageError

    tokens = TOKENS.value or 0
    rows: dict[int, list[list[int]]] = {length: [] for length in ([ROW_LENGTH.value] if ROW_LENGTH.value else LENGTHS)}
    for document in _documents(teacher):
        for length, rows_of_length in rows.items():
            if len(rows_of_length) * length < tokens:
                rows_of_length += [document[i : i + length] for i in range(0, len(document) - length + 1, length)]
        if len(rows_of_length := rows[max(rows)]) * max(rows) >= tokens:
            break
    # Take the longest rows that hold the requested tokens, or else those that hold the most.
    length = max(rows, key=lambda length: (min(tokens, len(rows[length]) * length), length))
    if not rows[length]:
        raise UsageError(f"--row_length={length}: no document of the text is that long. Lower it.")
    return torch.tensor(rows[length][: max(1, tokens // length)])


def _measure(text: Any, keep: int) -> tuple[list[float], tuple[int, ...]]:
    """Returns a score per layer, higher where it matters more, and the layers to keep."""
    from kd_core.students.layer_importance import (
        block_influence,
        drop_greedily,
        nll_with_layers,
        nll_without_each,
        top_layers,
    )

    layers = range(text.model.arch.num_layers)
    if MEASURE.value == "influence":
        scores = block_influence(text)
        return scores, top_layers(scores, keep)
    if MEASURE.value == "alone":
        base = nll_with_layers(text, layers)
        scores = [drop.nll - base for drop in nll_without_each(text, layers)]
        return scores, top_layers(scores, keep)
    dropped = drop_greedily(
        text, keep, lambda drop: app.log.info("without layer %d too: NLL %.3f", drop.layer, drop.nll)
    )
    order = [drop.layer for drop in dropped]
    scores = [float(order.index(layer) + 1) if layer in order else float(len(order) + 1) for layer in layers]
    return scores, tuple(layer for layer in layers if layer not in order)


def main() -> None:
    """Loads the teacher, measures its layers, and prints the table."""
    import torch

    from data.tokenizer import Tokenizer
    from kd_core.errors import UsageError
    from kd_core.files import write_json
    from kd_core.hub import local_folder
    from kd_core.precision import DTYPES, Precision, choose_precision
    from kd_core.students.layer_importance import LayerwiseText, nll_with_layers
    from kd_core.students.starts.start import Pretrained, build_student

    if TEACHER.value is None:
        raise UsageError("wanted --teacher=DIR. Try --help.")
    teacher = local_folder(TEACHER.value, "--teacher")
    rows = _rows(teacher)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_precision(cast(Precision, DTYPE.value), device)
    app.log.info("dtype: %s", chosen)
    chosen.warn_if_slow("--dtype")
    tokens = Tokenizer(teacher).vocab_size
    model = build_student(Pretrained(str(teacher)), device, 0, tokens).to(DTYPES[chosen.precision]).eval()
    count = model.arch.num_layers
    keep = KEEP.value or count // 2
    if not 0 < keep < count:
        raise UsageError(f"--keep={keep}: wanted 1 to {count - 1}, for {teacher} has {count} layers.")
    with torch.no_grad():
        text = LayerwiseText(model, rows.to(device))
    scores, kept_layers = _measure(text, keep)
    evenly_spaced = tuple(round(i * (count - 1) / max(1, keep - 1)) for i in range(keep))
    nll_by_layers = {
        f"all {count} layers": nll_with_layers(text, range(count)),
        f"the {keep} kept": nll_with_layers(text, kept_layers),
        f"{keep} evenly spaced": nll_with_layers(text, evenly_spaced),
    }
    score_titles = {
        "greedy": "dropped as number (more: kept)",
        "alone": "rise of NLL without it",
        "influence": "influence",
    }
    print(f"layer  {score_titles[MEASURE.value or '']}")
    for layer, score in enumerate(scores):
        print(f"{layer:>5}  {score:<8.4g} {'kept' if layer in kept_layers else ''}".rstrip())
    print(f"\nNLL on {rows.numel()} tokens, nats per token, before any training:")
    for name, nll in nll_by_layers.items():
        print(f"  {name:<22} {nll:.3f}")
    print(f"\n--config='student.keep_layers={kept_layers}'")
    if OUT.value:
        write_json(
            Path(OUT.value),
            {"measure": MEASURE.value, "keep_layers": kept_layers, "scores": scores, "nll": nll_by_layers},
        )


if __name__ == "__main__":
    app.run_command(main, "launchers.importance", __doc__ or "")
