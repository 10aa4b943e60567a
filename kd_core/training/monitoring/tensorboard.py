"""TensorBoard events of a run: metrics, texts and histograms. No other module imports TensorBoard.

SCALARS          every metric under its own name
CUSTOM SCALARS   the pages of `PAGES`, whose charts combine related metrics of training and held-out text
TEXT             the settings, and the student's continuations
HPARAMS          the trained settings of each run, beside its last metrics
HISTOGRAMS       parameters and gradients, if they are configured
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams import summary_v2
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as torch_hparams

from kd_core.losses import metric_table

QUEUE = 10_000  # numbers
FLUSH_SECONDS = 5
HParam = bool | float | str

# Regular expressions on the names of metrics by their group. Those of held-out text may name one of several caches.
GROUPS = {"val": r"val/([^/]+/)?"}


def _pages() -> dict[str, dict[str, str]]:
    """Returns charts by page: the title of each, and a regular expression on the names of its metrics."""
    patterns: dict[str, dict[str, list[str]]] = {}
    for row in metric_table.ROWS:
        groups = "|".join(GROUPS.get(group, f"{group}/") for group in row.groups)
        patterns.setdefault(row.page, {}).setdefault(row.chart, []).append(f"({groups}){row.name}$")
    pages = {page: {title: "|".join(names) for title, names in charts.items()} for page, charts in patterns.items()}
    # Terms have any name, so they are in no row.
    pages[metric_table.LOSSES] |= {"terms, training": r"train/.+_loss$", "terms, held out": f"{GROUPS['val']}.+_loss$"}
    return pages


PAGES = _pages()
# The first parts of the setting paths that determine what is trained.
TRAINED = ("student", "shards", "collate", "loss", "optimizer", "schedule", "steps", "seed", "tokens_per_step")


def parse_hparams(settings: Mapping[str, str]) -> dict[str, HParam]:
    """Parses the settings that determine what is trained, and returns their values by path.

    Values other than numbers, bools and texts stay as they are written.
    """
    hparams: dict[str, HParam] = {}
    for path, text in settings.items():
        if path.split(".", 1)[0] not in TRAINED:
            continue
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            value = text  # the name of a class or function
        hparams[path] = value if isinstance(value, bool | int | float | str) else text
    return hparams


def _markdown_table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", "<br>")

    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {cell(first)} | {cell(second)} |" for first, second in lines)


class Events:
    """A folder of TensorBoard events."""

    def __init__(self, folder: Path) -> None:
        # A separate thread writes the events, so that no step waits. Events lost to a kill are written anew on resume.
        self.writer = SummaryWriter(str(folder), max_queue=QUEUE, flush_secs=FLUSH_SECONDS)

    def begin(self, settings: Mapping[str, str], name: str) -> None:
        """Writes the layout of the pages, and the settings of a run under its name, if there are any."""
        layout = {
            page: {title: ["Multiline", [tag]] for title, tag in charts.items()} for page, charts in PAGES.items()
        }
        self.writer.add_custom_scalars(layout)
        if settings:
            self.writer.add_text("settings", _markdown_table(("setting", "value"), settings), 0)
            self.add_summary(summary_v2.hparams_pb(parse_hparams(settings), trial_id=name))

    def add(self, line: Mapping[str, float]) -> None:
        """Adds a line of metrics, each under its own name."""
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(line["step"]))

    def add_continuations(self, line: Mapping[str, Any]) -> None:
        """Adds the student's continuations at a step, by prompt."""
        self.writer.add_text(
            "continuations", _markdown_table(("prompt", "continuation"), line["continuations"]), line["step"]
        )

    def add_histograms(self, line: Mapping[str, Any]) -> None:
        """Adds the histograms of a step, by name."""
        for name, histogram in line["histograms"].items():
            self.writer.add_histogram_raw(name, **histogram, global_step=line["step"])

    def add_summary(self, summary: Any) -> None:
        """Adds a summary of a TensorBoard plugin."""
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(summary)

    def end(self) -> None:
        """Marks the run's row on the HPARAMS page as finished."""
        self.add_summary(torch_hparams({}, {})[2])

    def close(self) -> None:
        self.writer.close()


def write_columns(folder: Path, values: Mapping[str, Sequence[HParam]], metrics: Sequence[str]) -> None:
    """Writes the columns of the HPARAMS page: metrics, and the settings that differ between runs with all their values.

    The values of a setting are of one type.
    """
    hparams = [
        summary_v2.HParam(name, summary_v2.Discrete(list(dict.fromkeys(choices)))) for name, choices in values.items()
    ]
    events = Events(folder)
    events.add_summary(summary_v2.hparams_config_pb(hparams, [summary_v2.Metric(name) for name in metrics]))
    events.close()


def write_session(folder: Path, name: str, values: Mapping[str, HParam], lines: Sequence[dict[str, float]]) -> None:
    """Writes a finished run's row of the HPARAMS page: its settings, and curves whose last points are its metrics."""
    events = Events(folder)
    events.add_summary(summary_v2.hparams_pb(dict(values), trial_id=name))
    for line in lines:
        events.add(line)
    events.add_summary(torch_hparams({}, {})[2])  # the summary that marks the run as finished
    events.close()
