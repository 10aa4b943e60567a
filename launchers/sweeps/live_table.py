"""Terminal output of a running queue: a line per event and, on a terminal, a table below them that is redrawn."""

import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from launchers.reports import text_tables


class LiveTable:
    """Lines that stay, and a table below them that is redrawn where the stream is a terminal."""

    def __init__(
        self, header: Sequence[str], rows: Callable[[], text_tables.Rows], stream: TextIO | None = None
    ) -> None:
        self.header, self.rows = header, rows
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self.drawn_lines = 0

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        self._erase()
        self.stream.write(f"{text}\n")
        self.draw()

    def draw(self) -> None:
        """Draws the table in place of the previous one."""
        if self.is_terminal:
            self._erase()
            width = shutil.get_terminal_size().columns - 1  # a wrapped line would take two lines to erase
            lines = [line[:width] for line in text_tables.format_aligned(self.header, self.rows()).splitlines()]
            self.stream.write("".join(f"{line}\n" for line in lines))
            self.drawn_lines = len(lines)
        self.stream.flush()

    def _erase(self) -> None:
        if self.drawn_lines:
            self.stream.write(f"\x1b[{self.drawn_lines}F\x1b[J")
            self.drawn_lines = 0
