"""Runs side by side as one self-contained HTML page without scripts and links, where every text is escaped."""

import html
from collections.abc import Sequence

from launchers.reports.plots import COLOURS, svg_plot
from launchers.reports.runs import (
    Row,
    Run,
    column_titles,
    metric_names,
    metric_rows,
    other_quantities,
    provenance_rows,
    settings_rows,
)

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
td, th { padding: .1rem 1.2rem .1rem 0; text-align: left; border-bottom: 1px solid #8883; vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; max-width: 26rem; }
td:first-child { font-family: ui-monospace, monospace; font-size: 13px; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
svg { margin: 0 1rem 1rem 0; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
svg .title { font-size: 13px; font-weight: 600; }
svg .grid { stroke: #8883; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def _key(index: int, label: str) -> str:
    return f'<span class="key" style="background:{COLOURS[index % len(COLOURS)]}"></span>{html.escape(label)}'


def _table(head: Sequence[str], rows: Sequence[Row]) -> str:
    top = "".join(f"<th>{_key(index, label)}</th>" for index, label in enumerate(head))
    lines = [
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{html.escape(value)}</td>' for value in values)}</tr>"
        for name, values in rows
    ]
    return f"<table><tr><th></th>{top}</tr>{''.join(lines)}</table>"


def _section(title: str, head: Sequence[str], rows: Sequence[Row], if_empty: str) -> str:
    return f"<h2>{title}</h2>{_table(head, rows) if rows else f'<p>{if_empty}</p>'}"


def html_page(runs: list[Run], everything: bool, by_tokens: bool) -> str:
    """Returns the page."""
    names = column_titles(runs)
    across = "positions read" if by_tokens else "step"
    plots = [
        svg_plot(name, across, [(label, run.curve(name, by_tokens)) for label, run in zip(names, runs, strict=True)])
        for name in metric_names(runs)
    ]
    folders = "".join(f"<p>{_key(i, f'{names[i]}: {run.folder}')}</p>" for i, run in enumerate(runs))
    parts = [
        folders,
        _section("Settings that differ", names, settings_rows(runs, everything), "All settings are the same."),
        _section("Numbers", names, metric_rows(runs, everything), "No run has logged a number yet."),
        f"<p>{html.escape(other_quantities(runs))}</p>",
        "<h2>Curves</h2>" + "\n".join(plots) if plots else "",
        _section("Provenance", names, provenance_rows(runs, everything), "Nothing differs."),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Runs side by side</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{STYLE}</style></head>\n'
        "<body><h1>Runs side by side</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
