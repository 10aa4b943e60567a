"""Ranges of numbers that settings are of; a part checks its own when the graph is built."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kd_core.errors import UsageError


class Range(NamedTuple):
    """A range in words, and whether a number is in it. NaN is in none."""

    words: str
    holds: Callable[[float], bool]


NOT_NEGATIVE = Range("at least 0, and finite", lambda value: 0 <= value < math.inf)
AT_LEAST_0 = NOT_NEGATIVE._replace(words="at least 0")  # of counts
AT_LEAST_1 = Range("at least 1", lambda value: 1 <= value < math.inf)
ABOVE_0 = Range("more than 0, and finite", lambda value: 0 < value < math.inf)
SHARE = Range("0 to 1", lambda value: 0 <= value <= 1)
SHARE_ABOVE_0 = Range("more than 0, at most 1", lambda value: 0 < value <= 1)
SHARE_BELOW_1 = Range("0 to less than 1", lambda value: 0 <= value < 1)
SHARE_BETWEEN = Range("more than 0, less than 1", lambda value: 0 < value < 1)
# Python's locks and torch's groups wait no longer than some hundred years.
SECONDS = Range("seconds, more than 0 and at most 1e9", lambda value: 0 < value <= 1e9)
TEMPERATURE = Range("0.01 to 100", lambda value: 0.01 <= value <= 100)


def check_ranges(part: Any, where: str, **wanted: Range) -> None:
    """Refuse a part with a number out of its range. None is in every range, a tuple where all of its numbers are.

    `where` is the part's path with a dot behind it.

    Raises:
        UsageError: with the path of the number.
    """
    for name, each in wanted.items():
        value = getattr(part, name)
        values = value if isinstance(value, tuple) else (value,)
        if not all(number is None or each.holds(number) for number in values):
            raise UsageError(f"{where}{name}: got {value}; wanted {each.words}.")
