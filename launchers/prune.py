"""Write a narrower student: the channels, attention heads and layers of a teacher that matter on your text.

    python -m launchers.prune --teacher=quickstart/teacher --cache=quickstart/cache/train \\
        --layers=20 --num_kv_heads=2 --intermediate_size=1184 --out=quickstart/narrow
    python -m launchers.prune --teacher=my/teacher --text=my/corpus.txt --hidden_size=3072 --intermediate_size=9216 \\
        --out=my/narrow

--out is a Hugging Face folder of the smaller model, with the teacher's tokenizer. An experiment starts from it:

    --config='distill(model="my/narrow", cache="my/cache")'

Sizes that are not named stay. Each is cut where activations on the text are smallest (Minitron, arXiv 2407.14679):

    --hidden_size        channels of the residual stream, the same in all layers. Gains of norms are scaled, so that
                         norms of fewer channels give the same values on average.
    --intermediate_size  feed-forward channels, chosen in each layer
    --num_kv_heads       key and value heads, with all query heads of their groups, chosen in each layer
    --num_heads          query heads, the same number in each group of a kv head
    --layers             layers, chosen by --measure as in launchers.importance, or named by --keep_layers

A table shows the NLL on the text before any training: of the teacher, of the new student, and of a student of as many
parameters that has fewer layers alone. Try a few sizes: often a mixture begins best. OUT/pruned.json has the numbers.
The text is the first --tokens of a cache's records, or of a text file, in rows of --row_length.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from absl import flags

from launchers.cli import app
from launchers.cli.folder_guard import refuse_full_folder
from launchers.cli.measured_text import read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from kd_core.students.starts.choose_pruning import PruningRequest
    from kd_core.students.width_selection import WidthSelection

TEACHER = flags.DEFINE_string(
    "teacher", None, "Hugging Face folder of the model to prune, or hub:OWNER/NAME; required."
)
OUT = flags.DEFINE_string("out", None, "The new folder; required.")
CACHE = flags.DEFINE_string("cache", None, "A teacher's cache whose text is used; or --text.")
TEXT = flags.DEFINE_string("text", None, "A text file; or --cache.")
WIDTHS = {
    "hidden_size": flags.DEFINE_integer("hidden_size", None, "Channels of the residual stream; default all."),
    "intermediate_size": flags.DEFINE_integer("intermediate_size", None, "Feed-forward channels; default all."),
    "num_kv_heads": flags.DEFINE_integer("num_kv_heads", None, "Key and value heads; default all."),
    "num_heads": flags.DEFINE_integer("num_heads", None, "Query heads; default all of the kv heads that stay."),
}
LAYERS = flags.DEFINE_integer("layers", None, "How many layers to keep; default all.")
KEEP_LAYERS = flags.DEFINE_list("keep_layers", None, "Which layers to keep, such as 0,1,4; or --layers.")
MEASURE = flags.DEFINE_enum(
    "measure", "influence", ["greedy", "alone", "influence"], "How layers are chosen; see launchers.importance."
)
TOKENS = flags.DEFINE_integer("tokens", 8192, "How many tokens to measure on.", lower_bound=2)
ROW_LENGTH = flags.DEFINE_integer(
    "row_length", None, "Tokens of a row; default 256, or less where the documents are shorter.", lower_bound=2
)
DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "Precision of matmuls while measuring. Weights keep their own."
)


def _requested_layers(count: int) -> tuple[int, ...] | int:
    """Returns the layers that --keep_layers names, or how many to choose.

    Raises:
        UsageError: the model does not have them, or flags are missing or in each other's way.
    """
    from kd_core.errors import UsageError

    if all(flag.value is None for flag in (*WIDTHS.values(), LAYERS, KEEP_LAYERS)):
        raise UsageError(f"wanted a size of the student: {', '.join(f'--{name}=N' for name in WIDTHS)} or --layers=N.")
    if LAYERS.value is not None and KEEP_LAYERS.value is not None:
        raise UsageError("wanted either --layers=N or --keep_layers=0,1,4.")
    if KEEP_LAYERS.value is None:
        layers = count if LAYERS.value is None else LAYERS.value
        if not 1 <= layers <= count:
            raise UsageError(f"--layers={layers}: wanted 1 to {count}, which the model has.")
        return layers
    names = KEEP_LAYERS.value
    if not names or set(names) - set(map(str, range(count))) or len(set(names)) != len(names):
        raise UsageError(f"--keep_layers={','.join(names)}: wanted different layers of 0 to {count - 1}.")
    return tuple(map(int, names))


def _print_report(report: Mapping[str, Any]) -> None:
    print(f"{'':<18}{'kept':>6}{'of':>7}   share of the importance")
    for name, (size, total) in report["sizes"].items():
        share = report["importance_kept"].get(name)
        print(f"{name:<18}{size:>6}{total:>7}   {'' if share is None else f'{share:.3f}'}".rstrip())
    print(f"\nNLL on {report['tokens']} tokens, nats per token, before any training:")
    for name, start in report["starts"].items():
        print(f"  {name:<30}{start['parameters'] / 1e6:>10.1f}M parameters {start['nll']:>8.3f}")
    cache = (CACHE.value or "my/cache/train").rstrip("/").rpartition("/")[0] or "."
    print(f'\n--config=\'distill(model="{OUT.value}", cache="{cache}")\'')


def _write(report: Mapping[str, Any], selection: "WidthSelection", teacher: Path, out: Path) -> None:
    """Writes the folder with its report, in the type of the teacher's weights."""
    import torch

    from kd_core.files import new_folder, write_json
    from kd_core.precision import DTYPES
    from kd_core.students.huggingface.save import save_pretrained
    from kd_core.students.huggingface.weights import stored_dtype
    from kd_core.students.starts.pruned_start import PrunedStart
    from kd_core.students.starts.start import build_student

    dtype = stored_dtype(teacher)
    student = build_student(PrunedStart(str(teacher), selection), torch.device("cpu"), 0, dtype=DTYPES[dtype])
    with new_folder(out) as partial:
        save_pretrained(student, partial, teacher, dtype=dtype)
        write_json(partial / "pruned.json", report)


def _measure(teacher: Path, request: "PruningRequest", rows: "Tensor") -> tuple["WidthSelection", dict[str, Any]]:
    """Returns what the student keeps, and the report. No model is in memory any more."""
    import torch
    from tqdm import tqdm

    from data.tokenizer import Tokenizer
    from kd_core.precision import DTYPES, Precision, choose_precision
    from kd_core.students.layer_importance import Drop, LayerwiseText, nll_with_layers
    from kd_core.students.starts.choose_pruning import choose_pruning, count_parameters
    from kd_core.students.starts.pruned_start import PrunedStart
    from kd_core.students.starts.start import Pretrained, StudentInit, build_student

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_precision(cast(Precision, DTYPE.value), device)
    app.log.info("dtype: %s", chosen)
    chosen.warn_if_slow("--dtype")
    vocab_size = Tokenizer(teacher).vocab_size

    @torch.no_grad()
    def on_text(start: StudentInit) -> LayerwiseText:
        model = build_student(start, device, 0, vocab_size, DTYPES[chosen.precision]).eval()
        return LayerwiseText(model, rows.to(device))

    def report_drop(drop: Drop) -> None:
        app.log.info("without layer %d too: NLL %.3f", drop.layer, drop.nll)

    text = on_text(Pretrained(str(teacher)))
    with tqdm(total=rows.numel(), unit="tok", desc="measuring widths", leave=False) as bar:
        selection, alone = choose_pruning(text, request, report_drop, bar.update)
    arch, pruned = text.model.arch, on_text(PrunedStart(str(teacher), selection))
    starts = {
        f"all {arch.num_layers} layers": (text, range(arch.num_layers)),
        "the pruned student": (pruned, range(request.num_layers)),
        f"{len(alone)} layers of full width": (text, alone),
    }
    return selection, {
        "teacher": str(teacher),
        "tokens": rows.numel(),
        "sizes": {name: (getattr(selection.arch, name), getattr(arch, name)) for name in ("num_layers", *WIDTHS)},
        "importance_kept": selection.shares,
        "starts": {
            name: {
                "parameters": count_parameters(text.model.arch, len(layers)),
                "nll": nll_with_layers(text, layers),
            }
            for name, (text, layers) in starts.items()
        },
        "keep_layers": selection.layers,
        "hidden_channels": selection.hidden.tolist(),
        "feed_forward_channels": [channels.tolist() for channels in selection.feed_forward],
        "heads": [heads.tolist() for heads in selection.heads],
        "factors": selection.factors,
    }


def main() -> None:
    """Measures the teacher, writes the student, and prints the table."""
    from kd_core.errors import UsageError
    from kd_core.hub import local_folder
    from kd_core.students.huggingface.config_json import warn_of_unloadable
    from kd_core.students.huggingface.weights import stored_architecture
    from kd_core.students.layer_importance import Measure
    from kd_core.students.starts.choose_pruning import PruningRequest
    from kd_core.students.width_selection import narrower

    if TEACHER.value is None or OUT.value is None:
        raise UsageError("wanted --teacher=DIR and --out=DIR. Try --help.")
    teacher, out = local_folder(TEACHER.value, "--teacher"), Path(OUT.value)
    arch = stored_architecture(teacher)
    narrow = narrower(arch, {name: flag.value for name, flag in WIDTHS.items()})
    request = PruningRequest(narrow, _requested_layers(arch.num_layers), cast(Measure, MEASURE.value))
    refuse_full_folder(out)
    warn_of_unloadable(narrow)
    rows = read_rows(teacher, CACHE.value, TEXT.value, ROW_LENGTH.value, TOKENS.value or 0)
    selection, report = _measure(teacher, request, rows)
    _write(report, selection, teacher, out)
    _print_report(report)


if __name__ == "__main__":
    app.run_command(main, "launchers.prune", __doc__ or "")
