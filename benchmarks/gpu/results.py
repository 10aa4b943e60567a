"""The page of a session on a device: bars, estimates beside measured times, and all numbers."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.roofline import fill

Line = Mapping[str, Any]
TITLES = {
    "probe": "The device", "loss": "Losses", "step": "Training steps", "fsdp": "FSDP2 on one rank",
    "export": "A teacher's export", "trace": "Traces",
}  # fmt: skip
LOSS, CE, STEP, STEP_CE = "loss, KD + CE", "loss, CE", "1B step, 4 rows of 4,096, 8 documents each", ", CE alone"
TEACHER = "8B teacher, bfloat16, 16 rows"


def read_numbers(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _milliseconds(lines: Iterable[Line]) -> dict[str, float]:
    """Returns times by name. A loss counts with bfloat16 weights."""
    return {line["name"]: line["ms"] for line in lines if "ms" in line and line.get("precision") != "autocast"}


class Bar(NamedTuple):
    """A bar of a ratio or share. `value` is None where something was not measured."""

    name: str
    value: float | None
    limit: float
    at_most: bool = True

    def __str__(self) -> str:
        """Returns a row of the page's first table."""
        sign = "≤" if self.at_most else "≥"
        if self.value is None:
            return f"| {self.name} | {sign} {self.limit} |  | not measured |"
        is_reached = self.value <= self.limit if self.at_most else self.value >= self.limit
        return (
            f"| {self.name} | {sign} {self.limit} | {self.value:.3f} | {'reached' if is_reached else 'not reached'} |"
        )


def bars(lines: list[Line]) -> list[Bar]:
    """Returns every bar. Ratios are within the run, and losses those with bfloat16 weights."""
    ms, numbers = _milliseconds(lines), {line["name"]: line for line in lines if line.get("precision") != "autocast"}

    def ratio(over: str, under: float | None) -> float | None:
        return ms[over] / under if over in ms and under else None

    def number(name: str, key: str) -> float | None:
        return numbers.get(name, {}).get(key)

    peers = [time for name, time in ms.items() if name in ("CE, Liger", "CE, QuACK")]
    objectives = [name for name in ms if name.startswith("loss, ") and "chunk" not in name and name not in (LOSS, CE)]
    slowest = max(objectives, key=lambda name: ms[name], default="")
    return [
        Bar("KD + CE / the three matmuls", ratio(LOSS, ms.get("the three matmuls")), 1.15),
        Bar("KD + CE / the fastest peer's CE", ratio(LOSS, min(peers, default=None)), 1.05),
        Bar("KD + CE, GiB over inputs", number(LOSS, "gib") or None, 4.0),
        Bar(f"slowest other objective ({slowest}) / KD + CE", ratio(slowest, ms.get(LOSS)), 1.05),
        Bar("1B step, packed: MFU", number(STEP, "mfu"), 0.45, at_most=False),
        Bar("1B step, KD + CE / CE alone", ratio(STEP, ms.get(STEP + STEP_CE)), 1.02),
        Bar("1B step, packed: waits of the host", number(STEP, "waits"), 0),
        Bar("export of an 8B teacher: share of the peak", number(TEACHER, "mfu"), 0.50, at_most=False),
        Bar("export / bare forward", number(TEACHER, "ratio"), 1.08),
    ]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(lines: list[Line]) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line if key not in ("part", "at")))
    rows = ["| " + " | ".join(_cell(line.get(key, "")) for key in columns) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *rows])


def page(lines: list[Line], estimates: str, device: str, date: str, is_trial: bool) -> str:
    """Returns the page: bars, estimates beside measured times, then every number by part."""
    parts = [
        f"## {title}\n\n{_table([line for line in lines if line['part'] == part])}"
        for part, title in TITLES.items()
        if any(line["part"] == part for line in lines)
    ]
    table = "\n".join(line for line in estimates.split("\n") if line.startswith("|"))
    return "\n\n".join([
        f"# On one {device}, {date}",
        "**A trial of the script on small sizes: none of this measures anything.**"
        if is_trial
        else "`make gpu`. Times are medians of one run, so ratios mean more than milliseconds.",
        "\n".join(["| bar | wanted | measured | |", "|---|---|---|---|", *map(str, bars(lines))]),
        "## Estimates and measurements\n\nAll columns but the last are estimates of the least (`roofline.py`).",
        fill(table, device, _milliseconds(lines)),
        *parts,
    ]) + "\n"  # fmt: skip
