"""The page of a session on a device: bars, estimates beside measured times, and all numbers."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.roofline import fill
from benchmarks.gpu.session import peak_flops

Line = Mapping[str, Any]
TITLES = {
    "probe": "The device", "loss": "Losses", "step": "Training steps", "fsdp": "FSDP2 on one rank",
    "export": "Scoring by a teacher", "trace": "Traces",
    "compiled": "Compiled training steps",
}  # fmt: skip
LOSS, CE, STEP, STEP_CE = "loss, KD + CE", "loss, CE", "1B step, 4 rows of 4,096, 8 documents each", ", CE alone"
PEERS = ("CE, Liger (Triton)", "CE, Liger (CuTe)", "CE, QuACK (CuTe)")
CUTE_PEERS = {name for name in PEERS if "CuTe" in name}
TEACHER = "8B teacher, bfloat16, 16 rows"


def read_numbers(path: Path) -> list[Line]:
    """Returns the lines of a file. Of one part, name and precision the last line counts, also where it failed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(line["part"], line["name"], line.get("precision")): line for line in lines}.values())


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
    # Traces have the names of the steps that they trace.
    lines = [line for line in lines if line["part"] != "trace"]
    ms, numbers = _milliseconds(lines), {line["name"]: line for line in lines if line.get("precision") != "autocast"}

    def ratio(over: str, under: float | None) -> float | None:
        return ms[over] / under if over in ms and under else None

    def number(name: str, key: str) -> float | None:
        return numbers.get(name, {}).get(key)

    fastest = min(set(PEERS) & ms.keys(), key=lambda name: ms[name], default="")
    # A peer of Triton alone is not the fastest that there is.
    peer = fastest if CUTE_PEERS & ms.keys() else ""
    objectives = [name for name in ms if name.startswith("loss, ") and "chunk" not in name and name not in (LOSS, CE)]
    slowest = max(objectives, key=lambda name: ms[name], default="")
    return [
        Bar("KD + CE / the three matmuls", ratio(LOSS, ms.get("the three matmuls")), 1.15),
        Bar(f"KD + CE / {peer or 'CE, QuACK or Liger in CuTe'}", ratio(LOSS, ms.get(peer)), 1.05),
        Bar("KD + CE, GiB over inputs", number(LOSS, "gib") or None, 4.0),
        Bar(f"slowest other objective ({slowest}) / KD + CE", ratio(slowest, ms.get(LOSS)), 1.05),
        Bar("1B step, packed: MFU", number(STEP, "mfu"), 0.45, at_most=False),
        Bar("1B step, KD + CE / CE alone", ratio(STEP, ms.get(STEP + STEP_CE)), 1.02),
        Bar("1B step, packed: waits of the host", number(STEP, "waits"), 0),
        Bar("scoring by an 8B teacher: share of the peak", number(TEACHER, "mfu"), 0.50, at_most=False),
        Bar("scoring / bare forward", number(TEACHER, "ratio"), 1.08),
    ]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(lines: list[Line]) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line if key not in ("part", "at")))
    rows = ["| " + " | ".join(_cell(line.get(key, "")) for key in columns) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *rows])


def _peak(device: str) -> str:
    """Returns a sentence on the peak that MFU is a share of."""
    peak = peak_flops(device)
    return f"MFU is a share of {peak / 1e12:.0f} TFLOP/s in bfloat16." if peak else "MFU: the peak of it is not known."


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
        else f"`make gpu`. Times are medians of one run, so ratios mean more than milliseconds. {_peak(device)}",
        "\n".join(["| bar | wanted | measured | |", "|---|---|---|---|", *map(str, bars(lines))]),
        "## Estimates and measurements\n\nAll columns but the last are estimates of the least (`roofline.py`).",
        fill(table, device, _milliseconds(lines)),
        *parts,
    ]) + "\n"  # fmt: skip
