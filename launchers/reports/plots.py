"""Curves as inline SVG with axes, ticks and a line per run, drawn without a library or a script."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 26, 36
COLOURS = ("#2468b4", "#d1495b", "#2e8b57", "#e08e1d", "#7a4fb0", "#178f9c", "#8c5a3c", "#c2489c", "#6b7280", "#8a9a1b")
Points = Sequence[tuple[float, float]]
MOST = 1e100  # beyond it, the size of a range would overflow


class Frame(NamedTuple):
    """Ranges of x and y that a plot shows."""

    x0: float
    x1: float
    y0: float
    y1: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Returns the pixels of a point."""
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def round_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Returns about `about` round numbers within [low, high], in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _frame(curves: Sequence[Points]) -> Frame:
    xs, ys = zip(*([point for curve in curves for point in curve] or [(0.0, 0.0)]), strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    margin = 0.05 * (y1 - y0) or abs(y1) * 0.1 or 1.0
    return Frame(x0, x1 if x1 > x0 else x0 + max(1, abs(x0) * 1e-6), y0 - margin, y1 + margin)


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.4g}"


def _axes(frame: Frame) -> list[str]:
    parts: list[str] = []
    for x in round_ticks(frame.x0, frame.x1):
        px, _ = frame.place(x, frame.y0)
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(x)}</text>')
    for y in round_ticks(frame.y0, frame.y1):
        _, py = frame.place(frame.x0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{_short(y)}</text>')
    return parts


def _line(frame: Frame, points: Points, label: str, colour: str) -> str:
    pixels = [frame.place(x, y) for x, y in points]
    title = f"<title>{html.escape(label)}: {points[-1][1]:.5g} at {points[-1][0]:g}</title>"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    dots = pixels if len(pixels) <= 12 else pixels[-1:]
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in dots)
    return f'<g>{title}<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>{marks}</g>'


def svg_plot(title: str, across: str, curves: Sequence[tuple[str, Points]]) -> str:
    """Returns one SVG with a line per curve.

    A curve's colour depends on its index alone, also where curves before it have no points. Numbers that are not
    finite, or not below `MOST`, are left out.
    """
    finite = [(label, [p for p in points if abs(p[1]) < MOST]) for label, points in curves]
    frame = _frame([points for _, points in finite if points])
    lines = [
        _line(frame, points, label, COLOURS[index % len(COLOURS)])
        for index, (label, points) in enumerate(finite)
        if points
    ]
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
            f'<text class="title" x="{LEFT}" y="16">{html.escape(title)}</text>',
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(across)}</text>',
            *_axes(frame),
            *lines,
            "</svg>",
        ]
    )


def sparkline(points: Points, width: int = 24) -> str:
    """Draws a curve in one line of text, with its lowest and highest value as the lowest and highest block."""
    values = [value for _, value in points if abs(value) < MOST]
    if not values:
        return ""
    samples = (
        [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)] if len(values) > width else values
    )
    low, high = min(samples), max(samples)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (value - low) / (high - low or 1)))] for value in samples)
