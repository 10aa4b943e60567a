"""Numbers of a session on a device as a page of tables, and what they say of the bars."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.roofline import fill

Line = Mapping[str, Any]
TITLES = {
    "probe": "The device", "loss": "Losses", "step": "Training steps", "fsdp": "FSDP2 on one rank",
    "export": "A teacher's export", "trace": "Traces",
}  # fmt: skip
LOSS, CE, STEP, STEP_CE = "loss, KD + CE", "loss, CE", "1B step, 4 rows of 4,096, 8 documents each", ", CE alone"


def read_numbers(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _milliseconds(lines: Iterable[Line]) -> dict[str, float]:
    """Returns times by name. A loss counts with bfloat16 weights."""
    return {line["what"]: line["ms"] for line in lines if "ms" in line and line.get("precision") != "autocast"}


def bars(lines: list[Line]) -> list[tuple[str, str, float | None, bool | None]]:
    """Returns each bar with what is wanted, what was measured (None: not measured), and whether it is reached."""
    ms = _milliseconds(lines)
    values = {line["what"]: line for line in lines if "ms" in line and line.get("precision") != "autocast"}

    def ratio(over: str, under: float | None) -> float | None:
        return ms[over] / under if over in ms and under else None

    peers = [time for name, time in ms.items() if name in ("CE, Liger", "CE, QuACK")]
    others = {name: time for name, time in ms.items() if name.startswith("loss, ") and "chunk" not in name}
    others = {name: time for name, time in others.items() if name not in (LOSS, CE)}
    slowest = max(others, key=lambda name: others[name], default="")
    exported = values.get("8B teacher, bfloat16, 16 rows", {})
    found: list[tuple[str, str, float | None, float, bool]] = [
        ("KD + CE / the three matmuls", "≤ 1.15", ratio(LOSS, ms.get("the three matmuls")), 1.15, True),
        ("KD + CE / the fastest peer's CE", "≤ 1.05", ratio(LOSS, min(peers, default=None)), 1.05, True),
        ("KD + CE, GiB over inputs", "≤ 4", values.get(LOSS, {}).get("gib") or None, 4.0, True),
        (f"slowest other objective ({slowest}) / KD + CE", "≤ 1.05", ratio(slowest, ms.get(LOSS)), 1.05, True),
        ("1B step, packed: MFU", "≥ 0.45", values.get(STEP, {}).get("mfu"), 0.45, False),
        ("1B step, KD + CE / CE alone", "≤ 1.02", ratio(STEP, ms.get(STEP + STEP_CE)), 1.02, True),
        ("export of an 8B teacher: share of the peak", "≥ 0.50", exported.get("mfu"), 0.50, False),
        ("export / bare forward", "≤ 1.08", exported.get("ratio"), 1.08, True),
    ]
    return [
        (what, wanted, value, None if value is None else (value <= bar if at_most else value >= bar))
        for what, wanted, value, bar, at_most in found
    ]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(lines: list[Line]) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line if key not in ("part", "at")))
    rows = ["| " + " | ".join(_cell(line.get(key, "")) for key in columns) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *rows])


def page(lines: list[Line], estimates: str, device: str, date: str, is_trial: bool) -> str:
    """Returns the page: bars, estimates beside measured times, then every number by part."""
    verdicts = {None: "not measured", True: "reached", False: "not reached"}
    rows = [
        f"| {what} | {wanted} | {'' if value is None else f'{value:.3f}'} | {verdicts[is_reached]} |"
        for what, wanted, value, is_reached in bars(lines)
    ]
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
        "| bar | wanted | measured | |\n|---|---|---|---|\n" + "\n".join(rows),
        "## Estimates and measurements\n\nAll columns but the last are estimates of the least (`roofline.py`).",
        fill(table, device, _milliseconds(lines)),
        *parts,
    ]) + "\n"  # fmt: skip
