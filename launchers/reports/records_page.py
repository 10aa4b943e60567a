"""Records of a cache as a table in the terminal, and as one self-contained HTML page."""

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data.cache.inspection.readable import (
    IdToText,
    ReadablePosition,
    escape_unprintable,
    fit_to_width,
    readable_positions,
    terminal_width,
)
from data.cache.record import Record

NARROW = 40
TOKEN, NUMBER = 14, 7
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0 2rem 1.5rem 0; display: inline-table; vertical-align: top; }
td, th { padding: .1rem .8rem .1rem 0; text-align: left; border-bottom: 1px solid #8883; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.text { font: 15px/2 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
.t { position: relative; border-radius: 3px; cursor: default; }
.t.context { opacity: .55; }
.t > .more { display: none; position: absolute; z-index: 1; left: 0; top: 1.7em; padding: .4rem .7rem;
  width: max-content; max-width: 22rem; background: Canvas; color: CanvasText; border: 1px solid #888;
  border-radius: 4px; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; }
.t:hover > .more, .t:focus > .more { display: block; }
.own { font-weight: bold; }
"""


class PageTables(NamedTuple):
    """Title, facts, costs and coverage of a cache, which the page shows above the records."""

    title: str
    facts: Sequence[tuple[str, str]]
    costs: Sequence[tuple[str, int, float]]
    coverage: Sequence[tuple[str, float]]


def _title(record: Record) -> str:
    document = escape_unprintable(record.document)
    return f"record {record.name}, {document} from token {record.start}, {record.positions} positions"


def terminal_lines(record: Record, words: IdToText, most: int, width: int) -> Iterator[str]:
    """Yields the lines of a record's table, each of at most `width` terminal columns."""
    width = max(width, NARROW)
    token = min(TOKEN, (width - NUMBER - 12) // 3)
    yield fit_to_width(_title(record), width).rstrip()
    yield fit_to_width(
        f"{'at':>5}  {'token':<{token}} {'came':<{token}} {'nats':>{NUMBER}}  the teacher expected", width
    ).rstrip()
    for index, position in enumerate(readable_positions(record, words, most)):
        mark = " " if position.scored else "·"
        texts = f"{fit_to_width(position.token, token)} {fit_to_width(position.label, token)}"
        line = f"{index:>5}{mark} {texts} {position.surprise:>{NUMBER}.2f}  "
        yield (line + _alternatives(position, width - terminal_width(line))).rstrip()


def _alternatives(position: ReadablePosition, width: int) -> str:
    """Returns as many alternatives as fit, each with its probability, then the probability of all others."""
    shown, rest = "", f"rest {position.rest:.0%}"
    for text, prob in position.alternatives:
        alternative = f"{text} {prob:.0%}  "
        if terminal_width(shown) + terminal_width(alternative) + terminal_width(rest) > width:
            break
        shown += alternative
    return shown + rest if terminal_width(shown) + terminal_width(rest) <= width else shown


def _colour(surprise: float) -> str:
    """Returns a background style, from transparent at 0 nats to full red at 8 and above."""
    share = min(1.0, max(0.0, surprise) / 8) if not math.isnan(surprise) else 1.0
    return f"background:rgb(220 60 30 / {0.75 * share:.2f})"


def _span(position: ReadablePosition) -> str:
    """Returns the HTML of a label, with a tooltip of its surprise and the teacher's alternatives."""
    probs = [f"{prob:>6.1%}  {alternative}" for alternative, prob in position.alternatives]
    surprise = [f"{position.surprise:.2f} nats" + ("" if position.scored else ", not scored")]
    alternative_lines = [
        f'<span class="own">{html.escape(line)}</span>' if text.text == position.label else html.escape(line)
        for line, text in zip(probs, position.alternatives, strict=True)
    ]
    lines = [
        *map(html.escape, [position.label, *surprise]),
        *alternative_lines,
        html.escape(f"{position.rest:>6.1%}  all others"),
    ]
    css_class = "t" if position.scored else "t context"
    label = html.escape(position.label).replace("\\n", "\\n\n") or "&nbsp;"
    tooltip = "\n".join(lines)
    colour = _colour(position.surprise)
    return f'<span class="{css_class}" tabindex="0" style="{colour}">{label}<span class="more">{tooltip}</span></span>'


def _record(record: Record, words: IdToText, most: int) -> str:
    positions = list(readable_positions(record, words, most))
    first = html.escape(positions[0].token) if positions else ""
    spans = "".join(_span(position) for position in positions)
    return f'<h2>{html.escape(_title(record))}</h2>\n<p class="text">{first}{spans}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table. The first column is text, and with a header the other columns are numbers."""
    numbers = ' class="n"' if len(head) > 1 else ""
    top = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    lines = [
        "<tr>"
        + "".join(
            f"<td{numbers if i else ''}>{html.escape(escape_unprintable(cell))}</td>" for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    ]
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{''.join(lines)}</table>"


def html_page(tables: PageTables, records: Sequence[Record], words: IdToText, most: int) -> str:
    """Returns the page. It has no scripts or links, and everything from the cache is escaped."""
    title = html.escape(escape_unprintable(tables.title))
    parts = [
        _table([], tables.facts),
        _table(
            ["bytes", "all", "a position"],
            [(name, f"{size:,}", f"{per_position:.2f}") for name, size, per_position in tables.costs],
        ),
        _table(
            ["likeliest", "teacher's mass over all positions"],
            [(name, f"{mass:.4f}") for name, mass in tables.coverage],
        )
        if tables.coverage
        else "",
        "<p>A token is the redder the less the teacher expected it. Point at one for what was expected in its place; "
        "pale ones are not scored.</p>",
        *(_record(record, words, most) for record in records),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
