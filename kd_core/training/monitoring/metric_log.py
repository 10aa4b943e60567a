"""A run's metrics as lines of JSON in its folder, and the same in TensorBoard.

    metrics.jsonl          the metrics of a logged step
    continuations.jsonl    the student's continuations of each prompt, at each validation
    histograms.jsonl       histograms of parameters and gradients, if they are configured

A resumed run cuts off the lines behind its checkpoint and writes TensorBoard anew from the rest. Neither then has a
gap or a step twice. Metrics that differ between two identical runs (times, memory) are named `speed/…`.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

from kd_core.files import damage_as_usage_error, open_no_follow, read_text, write_text
from kd_core.json_fields import LARGEST, check_integer, check_list, check_object, check_text, short_repr
from kd_core.training.monitoring.tensorboard import Events
from kd_core.training.run_folder import RunFolder, read_run_settings

Line = dict[str, Any]
MOST_METRICS, MOST_LINE = 1 << 27, 1 << 24  # bytes
SUMS = ("min", "max", "num", "sum", "sum_squares")


class _Lines:
    """A file with one line a step, each of which is also passed to `show`. It is created with the first line.

    Lines after `resume_step` are deleted, or all lines if it is None.
    """

    def __init__(self, path: Path, resume_step: int | None, show: Callable[[Line], None]) -> None:
        self.path, self.show = path, show
        lines: list[Line] = []
        if path.exists():
            if resume_step is not None:
                lines = [line for line in read_metrics(path) if line["step"] <= resume_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        for line in lines:
            show(line)
        self.file = self._open() if path.exists() else None

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, **values}
        self.file = self.file or self._open()
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.show(line)

    def _open(self) -> IO[str]:
        return open(self.path, "a", opener=open_no_follow)

    def close(self) -> None:
        if self.file:
            self.file.close()


class MetricLog:
    """The three files of lines in a run folder, and its `tensorboard/`.

    A log begins anew if `resume_step` is None. Otherwise it goes on after that step, and all later lines are deleted.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        for path in (folder / "tensorboard").glob("events.out.tfevents.*"):  # also where the folder is a link
            path.unlink()
        self.events = Events(folder / "tensorboard")
        self.events.begin(read_run_settings(RunFolder(folder)), name="/".join(folder.resolve().parts[-2:]))
        self.metrics = _Lines(folder / "metrics.jsonl", resume_step, self.events.add)
        self.continuations = _Lines(folder / "continuations.jsonl", resume_step, self.events.add_continuations)
        self.histograms = _Lines(folder / "histograms.jsonl", resume_step, self.events.add_histograms)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for output in (self.metrics, self.continuations, self.histograms, self.events):
                stack.callback(output.close)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of a step."""
        self.metrics.add(step, values)

    def add_continuations(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes the student's continuations by prompt."""
        self.continuations.add(step, {"continuations": dict(texts)})

    def add_histograms(self, step: int, histograms: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes histograms by name."""
        self.histograms.add(step, {"histograms": dict(histograms)})

    def end(self) -> None:
        """Marks the run as finished in TensorBoard."""
        self.events.end()


def read_metrics(path: Path) -> list[Line]:
    """Reads the lines of a `metrics.jsonl`, without a last line that a kill cut short.

    Raises:
        UsageError: a line has no step, or something other than numbers, continuations or histograms.
    """
    lines: list[Line] = []
    for number, line in enumerate(read_text(path, "a run's numbers", MOST_METRICS).split("\n"), 1):
        with damage_as_usage_error(f"{path}:{number}", "a step's numbers", "Delete the line"):
            if len(line) > MOST_LINE:
                raise ValueError(f"{len(line)} characters")
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                break
            lines.append(_checked(value))
    return lines


def _checked(value: Any) -> Line:
    """Checks the types of a line: its step, numbers, continuations as texts by prompt, and histograms by name."""
    line = check_object(value, "it")
    json.dumps(line, ensure_ascii=False).encode()  # fails at half a surrogate pair, which TensorBoard cannot write
    check_integer(line.get("step"), "step", 0, 1 << 53)
    for name, entry in line.items():
        if name == "continuations":
            for continuation in check_object(entry, name).values():
                check_text(continuation, name)
        elif name == "histograms":
            for histogram in check_object(entry, name).values():
                _check_histogram(check_object(histogram, name, (*SUMS, "bucket_limits", "bucket_counts")))
        elif not _is_number(entry):
            raise ValueError(f"{short_repr(name)}: {short_repr(entry)}; wanted a number")
    return line


def _is_number(value: Any) -> bool:
    """Checks for a float, finite or not, or an integer of at most `LARGEST`. A bool is neither."""
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST)


def _check_histogram(histogram: dict[str, Any]) -> None:
    limits, counts = (check_list(histogram[name], name) for name in ("bucket_limits", "bucket_counts"))
    if len(limits) != len(counts) or not all(map(_is_number, [*limits, *counts, *(histogram[name] for name in SUMS)])):
        raise ValueError("a histogram has other than numbers, and a count for each limit")


def per_token(prefix: str, sums: Mapping[str, float], tokens: float) -> dict[str, float]:
    """Returns means over scored tokens under `prefix/`, and the number of tokens as `prefix/tokens`."""
    means = {f"{prefix}/{name}": value / max(1, tokens) for name, value in sums.items()}
    return {**means, f"{prefix}/tokens": float(tokens)}
