"""A sandbox for chat templates, which are programs of whoever made the model: no code, memory and time have an end.

jinja2's sandbox keeps a template from Python's objects. What is bounded here besides: operators that make much out of
little, the text that comes out, the time of the processor, and, on Linux, the memory of the process meanwhile.
"""

import contextlib
import re
import signal
import threading
from collections.abc import Generator, Iterable
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kd_core.memory import bounded_memory

MOST_TEXT = 1 << 25  # characters of a text, items of a list
MOST_BITS = 1 << 12  # of a number
MOST_MEMORY = 1 << 30  # bytes beyond what the process has
WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)")  # of a % format


def _bits(value: Any) -> int:
    return abs(value).bit_length() if isinstance(value, int) else 0


def _items(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def _is_small(operator: str, left: Any, right: Any) -> bool:
    """Checks that an operator's result has a size that honest templates reach."""
    if operator == "**":
        return max(_bits(left), 1) * abs(right) <= MOST_BITS
    if operator == "*":
        times = left if isinstance(left, int) else right
        return max(_items(left), _items(right)) * times <= MOST_TEXT and _bits(left) + _bits(right) <= MOST_BITS
    if operator == "%" and isinstance(left, str):
        return WIDTH.search(left) is None
    return _items(left) + _items(right) <= MOST_TEXT


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with operators whose results stay small; constants of a template go through the same."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Carry an operator out.

        Raises:
            TemplateError: its result would be too large.
        """
        if not _is_small(operator, left, right):
            raise TemplateError(f"{operator} would make more than a chat template is let make")
        return super().call_binop(context, operator, left, right)


def bounded_text(pieces: Iterable[str]) -> str:
    """The pieces of a rendered template end to end.

    Raises:
        TemplateError: they are too many.
    """
    found: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MOST_TEXT:
            raise TemplateError(f"it writes more than {MOST_TEXT} characters")
        found.append(piece)
    return "".join(found)


@contextlib.contextmanager
def bounded(seconds: float) -> Generator[None]:
    """Bound the processor's time and the memory of what runs inside.

    Raises:
        TemplateError: it took more.
    """
    try:
        with _bounded_time(seconds), bounded_memory(MOST_MEMORY):
            yield
    except MemoryError:
        raise TemplateError(f"it takes more than {MOST_MEMORY >> 20} MiB of memory") from None


@contextlib.contextmanager
def _bounded_time(seconds: float) -> Generator[None]:
    """Python hands signals to its main thread alone; in another one nothing is bounded."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise TemplateError(f"it takes more than {seconds:g} seconds")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
