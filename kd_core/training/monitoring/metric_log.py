"""What a run reports, as lines of JSON in its folder, and the same in TensorBoard.

    metrics.jsonl          the numbers of a logged step
    continuations.jsonl    what the student says after each prompt, at each validation
    histograms.jsonl       parameters and gradients, where they are asked for

After a resume, lines beyond the checkpoint are cut off and TensorBoard is written anew from the rest, so all
go on without a gap or a double. What a repeated run cannot repeat (times, memory) stands under `speed/`.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

from kd_core.files import damaged, no_link, read_text, write_text
from kd_core.json_fields import LARGEST, fields, integer, items, shown, text
from kd_core.training.monitoring.tensorboard import Events
from kd_core.training.run_folder import RunFolder, settings_of

Line = dict[str, Any]
MOST_METRICS, MOST_LINE = 1 << 27, 1 << 24  # bytes
SUMS = ("min", "max", "num", "sum", "sum_squares")


class _Lines:
    """A file of lines, one a step, each also handed to `show`; it exists once there is a line."""

    def __init__(self, path: Path, resume_step: int | None, show: Callable[[Line], None]) -> None:
        """Start anew, or go on after `resume_step` with everything later forgotten."""
        self.path, self.show = path, show
        kept: list[Line] = []
        if path.exists():
            if resume_step is not None:
                kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        for line in kept:
            show(line)
        self.file = self._open() if path.exists() else None

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, **values}
        self.file = self.file or self._open()
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.show(line)

    def _open(self) -> IO[str]:
        return open(self.path, "a", opener=no_link)

    def close(self) -> None:
        if self.file:
            self.file.close()


class MetricLog:
    """Appends to the lines of a run folder and to its `tensorboard/`."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        """Start anew, or go on after `resume_step` with everything later forgotten."""
        for path in (folder / "tensorboard").glob("events.out.tfevents.*"):  # also where the folder is a link
            path.unlink()
        self.events = Events(folder / "tensorboard")
        self.events.begin(settings_of(RunFolder(folder)), name="/".join(folder.resolve().parts[-2:]))
        self.numbers = _Lines(folder / "metrics.jsonl", resume_step, self.events.add)
        self.said = _Lines(folder / "continuations.jsonl", resume_step, self.events.add_continuations)
        self.spreads = _Lines(folder / "histograms.jsonl", resume_step, self.events.add_histograms)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for each in (self.numbers, self.said, self.spreads, self.events):
                stack.callback(each.close)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write one step's numbers."""
        self.numbers.add(step, values)

    def add_continuations(self, step: int, said: Mapping[str, str]) -> None:
        """Write what the student said, by prompt."""
        self.said.add(step, {"continuations": dict(said)})

    def add_histograms(self, step: int, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Write histograms, by name."""
        self.spreads.add(step, {"histograms": dict(found)})

    def end(self) -> None:
        """The run has come to its end."""
        self.events.end()


def read_metrics(path: Path) -> list[Line]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is not one.

    Raises:
        UsageError: a line without a step, or with something else than numbers, continuations or histograms.
    """
    lines: list[Line] = []
    for number, line in enumerate(read_text(path, "a run's numbers", MOST_METRICS).split("\n"), 1):
        with damaged(f"{path}:{number}", "a step's numbers", "Delete the line"):
            if len(line) > MOST_LINE:
                raise ValueError(f"{len(line)} characters")
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                break
            lines.append(_checked(value))
    return lines


def _checked(value: Any) -> Line:
    """A line with its step; continuations are texts by prompt, histograms numbers and lists of them by name."""
    line = fields(value, "it")
    json.dumps(line, ensure_ascii=False).encode()  # half a surrogate pair is no text, and TensorBoard cannot write it
    integer(line.get("step"), "step", 0, 1 << 53)
    for name, each in line.items():
        if name == "continuations":
            for said in fields(each, name).values():
                text(said, name)
        elif name == "histograms":
            for found in fields(each, name).values():
                _check_histogram(fields(found, name, (*SUMS, "bucket_limits", "bucket_counts")))
        elif not _is_number(each):
            raise ValueError(f"{shown(name)}: {shown(each)}; wanted a number")
    return line


def _is_number(value: Any) -> bool:
    """Returns True for a float, finite or not, and for an integer that is one."""
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST)


def _check_histogram(found: dict[str, Any]) -> None:
    limits, counts = (items(found[name], name) for name in ("bucket_limits", "bucket_counts"))
    if len(limits) != len(counts) or not all(map(_is_number, [*limits, *counts, *(found[name] for name in SUMS)])):
        raise ValueError("a histogram has other than numbers, and a count for each limit")


def per_token(prefix: str, sums: Mapping[str, float], tokens: float) -> dict[str, float]:
    """Means over scored tokens, under `prefix/`, with their count as `prefix/tokens`."""
    means = {f"{prefix}/{name}": value / max(1, tokens) for name, value in sums.items()}
    return {**means, f"{prefix}/tokens": float(tokens)}
