"""The one module that knows TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams import summary_v2
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as torch_hparams

HParam = bool | float | str

QUEUE = 10_000  # numbers
FLUSH_SECONDS = 5


class Events:
    """A folder of TensorBoard events."""

    def __init__(self, folder: Path) -> None:
        # A thread of its own writes; a step must not wait for it. What a kill takes from it is written anew on resume.
        self.writer = SummaryWriter(str(folder), max_queue=QUEUE, flush_secs=FLUSH_SECONDS)

    def add(self, line: dict[str, float]) -> None:
        """One metrics line, each number under its own name."""
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(line["step"]))

    def add_summary(self, summary: Any) -> None:
        """A summary as a plugin made it."""
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(summary)

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
