"""The one module that knows TensorBoard: a run's numbers, texts and histograms as events, and pages to look at them.

SCALARS          every number under its own name
CUSTOM SCALARS   the pages of `PAGES`: what belongs together in one chart, training beside held-out text
TEXT             the settings; what the student says
HPARAMS          what is trained, beside the last numbers of each run
HISTOGRAMS       parameters and gradients, where they are asked for
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams import summary_v2
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as torch_hparams

QUEUE = 10_000  # numbers
FLUSH_SECONDS = 5
HParam = bool | float | str

# Charts by page, each the names that it shows: expressions, so that terms and caches of any name are found.
BOTH, HELD_OUT = r"(train|val)/", r"val/([^/]+/)?"
PAGES: dict[str, dict[str, str]] = {
    "Losses": {
        "objective": rf"{BOTH}loss$",
        "terms, training": r"train/.+_loss$",
        "terms, held out": rf"{HELD_OUT}.+_loss$",
        "NLL, held out": rf"{HELD_OUT}(teacher_)?nll$",
        "KL and reverse KL, held out": rf"{HELD_OUT}(kl|reverse_kl|renormalized_kl|teacher_cross_entropy)$",
        "perplexity": rf"{HELD_OUT}perplexity$",
        "bits per byte": rf"{HELD_OUT}bits_per_byte$",
    },
    "Distribution": {
        "entropies": rf"({BOTH}|{HELD_OUT})(teacher|student)_entropy$",
        "masses on the teacher's entries": rf"({BOTH}|{HELD_OUT})(teacher_mass|student_mass|label_in_support)$",
        "agreement": rf"({BOTH}|{HELD_OUT})top(1|5|k)_agreement$",
        "acceptance": rf"({BOTH}|{HELD_OUT})acceptance$",
        "calibration error": rf"{HELD_OUT}ece$",
        "temperature that would mend it": rf"{HELD_OUT}temperature$",
    },
    "Optimisation": {
        "learning rate": r"train/lr$",
        "gradient norm": r"train/grad_norm$",
        "skipped steps": r"train/skipped_steps$",
    },
    "Speed and data": {
        "tokens a second": r"speed/tokens_per_second$",
        "share of time waiting for data": r"speed/data_wait_share$",
        "seconds": r"speed/(step|data_wait)_seconds$",
        "memory, GiB": r"speed/memory_gib$",
        "scored tokens of a step": r"train/tokens$",
        "damaged blocks": r"data/damaged_blocks$",
    },
}
# Of the settings, what is trained.
TRAINED = ("student", "shards", "collate", "loss", "optimizer", "schedule", "steps", "seed", "tokens_per_step")


def hparams_of(settings: Mapping[str, str]) -> dict[str, HParam]:
    """Of values by path, as they are written, the numbers, truths and texts of what is trained."""
    found: dict[str, HParam] = {}
    for path, text in settings.items():
        if path.split(".", 1)[0] not in TRAINED:
            continue
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            value = text  # the name of a part
        found[path] = value if isinstance(value, bool | int | float | str) else text
    return found


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    """Markdown."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", "<br>")

    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {cell(first)} | {cell(second)} |" for first, second in lines)


class Events:
    """A folder of TensorBoard events."""

    def __init__(self, folder: Path) -> None:
        # A thread of its own writes; a step must not wait for it. What a kill takes from it is written anew on resume.
        self.writer = SummaryWriter(str(folder), max_queue=QUEUE, flush_secs=FLUSH_SECONDS)

    def begin(self, settings: Mapping[str, str], name: str) -> None:
        """Lay out the pages, and note the settings of a run, if there are any, under its name."""
        layout = {
            page: {title: ["Multiline", [tag]] for title, tag in charts.items()} for page, charts in PAGES.items()
        }
        self.writer.add_custom_scalars(layout)
        if settings:
            self.writer.add_text("settings", _table(("setting", "value"), settings), 0)
            self.add_summary(summary_v2.hparams_pb(hparams_of(settings), trial_id=name))

    def add(self, line: Mapping[str, float]) -> None:
        """One metrics line, each number under its own name."""
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(line["step"]))

    def add_continuations(self, line: Mapping[str, Any]) -> None:
        """What the student said at a step, by prompt."""
        self.writer.add_text("continuations", _table(("prompt", "continuation"), line["continuations"]), line["step"])

    def add_histograms(self, line: Mapping[str, Any]) -> None:
        """Histograms of a step, by name."""
        for name, found in line["histograms"].items():
            self.writer.add_histogram_raw(name, **found, global_step=line["step"])

    def add_summary(self, summary: Any) -> None:
        """A summary as a plugin made it."""
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(summary)

    def end(self) -> None:
        """The run's row among the HPARAMS is finished."""
        self.add_summary(torch_hparams({}, {})[2])

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


def write_columns(folder: Path, values: Mapping[str, Sequence[HParam]], metrics: Sequence[str]) -> None:
    """The columns of the HPARAMS page: what runs differ in, with all its values (of one type a name), and metrics."""
    hparams = [summary_v2.HParam(name, summary_v2.Discrete(list(dict.fromkeys(each)))) for name, each in values.items()]
    events = Events(folder)
    events.add_summary(summary_v2.hparams_config_pb(hparams, [summary_v2.Metric(name) for name in metrics]))
    events.close()


def write_session(folder: Path, name: str, values: Mapping[str, HParam], lines: Sequence[dict[str, float]]) -> None:
    """A finished run's row of that page: its values, and curves whose last points are its metrics."""
    events = Events(folder)
    events.add_summary(summary_v2.hparams_pb(dict(values), trial_id=name))
    for line in lines:
        events.add(line)
    events.add_summary(torch_hparams({}, {})[2])  # ended well
    events.close()
