"""Compare runs side by side: settings that differ, provenance, last and best numbers, curves.

    python -m launchers.compare runs/quickstart runs/faster
    python -m launchers.compare runs/* --html=runs/compare.html
    python -m launchers.compare runs/quickstart runs/again --all

Runs may still be under way. Differences are to the first run, and only between numbers of the same quantity, so not
between losses of two objectives. --html writes one self-contained page with a plot for each number.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launchers.cli import app

HTML = flags.DEFINE_string("html", None, "Also write a page to this file.")
ALL = flags.DEFINE_bool("all", False, "Also show what is the same.")
X = flags.DEFINE_enum("x", "steps", ["steps", "tokens"], "The horizontal axis of the curves: steps, or positions read.")
MOST_RUNS = 26


def _cut(cells: Sequence[str], room: int) -> list[str]:
    """Returns cells cut to at most `room` characters. Cells that are too long start shortly before they differ."""
    longest = max(map(len, cells))
    common_prefix = next((index for index, letters in enumerate(zip(*cells, strict=False)) if len(set(letters)) > 1), 0)
    start = min(max(0, common_prefix - 4), longest - room + 1) if longest > room and len(set(cells)) > 1 else 0
    moved = [f"…{cell[start:]}" if start > 0 else cell for cell in cells]
    return [cell if len(cell) <= room else cell[: room - 1] + "…" for cell in moved]


def _table(title: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], if_empty: str) -> None:
    print(f"\n{title}" if rows else f"\n{title}: {if_empty}")
    if not rows:
        return
    lines = [("", list(head)), *rows]
    first = max(len(name) for name, _ in lines)
    room = max(16, (shutil.get_terminal_size((120, 24)).columns - first - 2) // len(head) - 2)
    cut = [(name, _cut(cells, room)) for name, cells in lines]
    widths = [max(len(cells[column]) for _, cells in cut) for column in range(len(head))]
    for name, cells in cut:
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"  {name:<{first}}  {'  '.join(padded)}".rstrip())


def main(*folders: str) -> None:
    """Reads the runs, prints their tables, and writes the page if --html names one."""
    from kd_core.errors import UsageError, escape_unprintable
    from kd_core.files import write_text
    from launchers.reports import runs as run_tables
    from launchers.reports.plots import sparkline
    from launchers.reports.runs import column_titles, metric_names, read_run
    from launchers.reports.runs_page import html_page

    if len(folders) > MOST_RUNS:
        raise UsageError(f"{len(folders)} runs given; wanted at most {MOST_RUNS}.")
    runs = [read_run(Path(folder)) for folder in folders]
    names = column_titles(runs)
    for name, run in zip(names, runs, strict=True):
        note = "" if run.lines else "  (no number logged yet)"
        print(f"{name}: {escape_unprintable(str(run.folder))}, step {run.step} of {run.steps}{note}")
    _table("Settings that differ", names, run_tables.settings_rows(runs, ALL.value), "none.")
    _table("Provenance", names, run_tables.provenance_rows(runs, ALL.value), "nothing differs.")
    _table(
        "Numbers, last (and difference to A)",
        names,
        run_tables.metric_rows(runs, ALL.value),
        "no run has logged any yet.",
    )
    if note := run_tables.other_quantities(runs):
        print(f"  {note}")
    shown = [name for name in metric_names(runs) if name in run_tables.MAIN_CURVES]
    _table("Curves", names, [(name, [sparkline(run.curve(name)) for run in runs]) for name in shown], "none yet.")
    if HTML.value:
        Path(HTML.value).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(HTML.value), html_page(runs, ALL.value, X.value == "tokens"))
        print(f"\n{HTML.value}: written")


if __name__ == "__main__":
    app.run_command(main, "launchers.compare", __doc__ or "", arguments=["RUN"], more=True)
