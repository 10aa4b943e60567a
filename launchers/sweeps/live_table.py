"""What a queue shows while it runs: a line an event, and on a terminal a table below them that moves."""

import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from launchers.reports import text_tables


class Live:
    """Lines that stay, and a table that is drawn anew where the stream is a terminal."""

    def __init__(self, head: Sequence[str], rows: Callable[[], text_tables.Rows], stream: TextIO | None = None) -> None:
        self.head, self.rows = head, rows
        self.stream = stream or sys.stderr
        self.moves = self.stream.isatty()
        self.drawn = 0

    def say(self, text: str) -> None:
        """One line that stays."""
        self._erase()
        self.stream.write(f"{text}\n")
        self.draw()

    def draw(self) -> None:
        """The table in place of the one before."""
        if self.moves:
            self._erase()
            width = shutil.get_terminal_size().columns - 1  # a line that wraps would be two to erase
            lines = [line[:width] for line in text_tables.aligned(self.head, self.rows()).splitlines()]
            self.stream.write("".join(f"{line}\n" for line in lines))
            self.drawn = len(lines)
        self.stream.flush()

    def _erase(self) -> None:
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")
            self.drawn = 0
