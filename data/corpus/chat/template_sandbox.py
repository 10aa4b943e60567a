"""A sandbox for chat templates, which are untrusted programs: no Python code, and limits to memory and time.

jinja2's sandbox keeps a template from Python's objects. This module also limits operators that make large values out
of small ones, the length of the output, the processor time and, on Linux, the memory of the process meanwhile.
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
WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)")  # a wide field of a % format


def _bits(value: Any) -> int:
    return abs(value).bit_length() if isinstance(value, int) else 0


def _items(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def _is_small(operator: str, left: Any, right: Any) -> bool:
    """Returns True where the result of an operator is no larger than honest templates need."""
    if operator == "**":
        return max(_bits(left), 1) * abs(right) <= MOST_BITS
    if operator == "*":
        times = left if isinstance(left, int) else right
        return max(_items(left), _items(right)) * times <= MOST_TEXT and _bits(left) + _bits(right) <= MOST_BITS
    if operator == "%" and isinstance(left, str):
        return WIDTH.search(left) is None
    return _items(left) + _items(right) <= MOST_TEXT


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with operators whose results stay small, also in constants that are folded at compile time."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Evaluates a binary operator.

        Raises:
            TemplateError: the result would be too large.
        """
        if not _is_small(operator, left, right):
            raise TemplateError(f"{operator} would make more than a chat template may")
        return super().call_binop(context, operator, left, right)


def join_limited(pieces: Iterable[str]) -> str:
    """Joins the pieces of a rendered template.

    Raises:
        TemplateError: they have more than `MOST_TEXT` characters.
    """
    parts: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MOST_TEXT:
            raise TemplateError(f"it writes more than {MOST_TEXT} characters")
        parts.append(piece)
    return "".join(parts)


@contextlib.contextmanager
def limited_resources(seconds: float) -> Generator[None]:
    """Limits the processor time and the memory of the code inside.

    Raises:
        TemplateError: it took more.
    """
    try:
        with _limited_time(seconds), bounded_memory(MOST_MEMORY):
            yield
    except MemoryError:
        raise TemplateError(f"it takes more than {MOST_MEMORY >> 20} MiB of memory") from None


@contextlib.contextmanager
def _limited_time(seconds: float) -> Generator[None]:
    """Limits the processor time, in the main thread only: Python delivers signals to no other."""

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
