"""The run's numbers: one JSON object a logged step, and the same numbers to TensorBoard.

After a resume, lines beyond the checkpoint are cut off and TensorBoard is written anew from the rest, so both
go on without a gap or a double. What a repeated run cannot repeat (times) stands under `speed/`.
"""

import json
import shutil
from pathlib import Path
from typing import Self

from kd_core.files import write_text
from kd_core.training.tensorboard import Events


class MetricLog:
    """Appends to `metrics.jsonl` and to `tensorboard/` of a run folder."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        """Start anew, or go on after `resume_step` with everything later forgotten."""
        self.path = folder / "metrics.jsonl"
        kept: list[dict[str, float]] = []
        if resume_step is not None and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.file = self.path.open("a")
        self.events = Events(folder / "tensorboard")
        for line in kept:
            self.events.add(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.events.close()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write one step's numbers."""
        line: dict[str, float] = {"step": step, **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.events.add(line)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is not one."""
    lines: list[dict[str, float]] = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def per_token(prefix: str, sums: dict[str, float], tokens: int) -> dict[str, float]:
    """Means over scored tokens, under `prefix/`, with their count as `prefix/tokens`."""
    means = {f"{prefix}/{name}": value / max(1, tokens) for name, value in sums.items()}
    return {**means, f"{prefix}/tokens": float(tokens)}
