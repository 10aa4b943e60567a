"""Tables as text: aligned columns, Markdown, CSV."""

import csv
import io
from collections.abc import Sequence

from kd_core.errors import escape_unprintable

Rows = Sequence[Sequence[str]]


def format_aligned(head: Sequence[str], rows: Rows) -> str:
    """Formats columns two spaces apart, those of numbers aligned to the right. Unprintable characters are escaped."""
    head, rows = (
        [escape_unprintable(cell) for cell in head],
        [[escape_unprintable(cell) for cell in row] for row in rows],
    )
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    is_right_aligned = [all(_is_number(row[i]) for row in rows if row[i]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        placed = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, is_right_aligned, strict=True)
        )
        return "  ".join(placed).rstrip()

    return "\n".join(line(row) for row in (head, *rows))


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


def format_markdown(head: Sequence[str], rows: Rows) -> str:
    """Formats a Markdown pipe table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def format_csv(head: Sequence[str], rows: Rows) -> str:
    """Formats CSV with one header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
