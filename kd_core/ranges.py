"""Checks of settings: ranges of numbers, and choices. A part checks its own when the experiment's graph is built."""

import math
import sys
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from kd_core.errors import UsageError

LARGEST, SMALLEST, BELOW_1 = sys.float_info.max, math.nextafter(0, 1), math.nextafter(1, 0)


class Range(NamedTuple):
    """A range in words, and its least and its largest number. NaN is in none."""

    words: str
    least: float
    most: float


AT_LEAST_0 = Range("at least 0", 0, LARGEST)
AT_LEAST_1 = Range("at least 1", 1, LARGEST)
NOT_NEGATIVE = Range("at least 0, and finite", 0, LARGEST)
ABOVE_0 = Range("more than 0, and finite", SMALLEST, LARGEST)
SHARE = Range("0 to 1", 0, 1)
SHARE_ABOVE_0 = Range("more than 0, at most 1", SMALLEST, 1)
SHARE_BELOW_1 = Range("0 to less than 1", 0, BELOW_1)
SHARE_BETWEEN = Range("more than 0, less than 1", SMALLEST, BELOW_1)
# Python's locks and torch's process groups accept no wait of more than some hundred years.
SECONDS = Range("seconds, more than 0 and at most 1e9", SMALLEST, 1e9)
TEMPERATURE = Range("0.01 to 100", 0.01, 100)


def check_settings(part: Any, where: str, **ranges: Range) -> None:
    """Checks that numbers are in their ranges, and that each `Literal` of a dataclass has one of its values.

    None is in every range, and a tuple is in a range if all of its numbers are.

    Args:
        part: the object whose attributes are checked.
        where: the path of the part in the graph, with a dot behind it.
        ranges: the range of each attribute, by its name.

    Raises:
        UsageError: a number is out of its range, or a choice is unknown. The message begins with its path.
    """
    for field in fields(part) if is_dataclass(part) else ():
        if get_origin(field.type) is Literal and (value := getattr(part, field.name)) not in get_args(field.type):
            choices = ", ".join(map(str, get_args(field.type)))
            raise UsageError(f"{where}{field.name}: got {value!r}; wanted one of {choices}.")
    for name, allowed in ranges.items():
        value = getattr(part, name)
        values = value if isinstance(value, tuple) else (value,)
        if not all(number is None or allowed.least <= number <= allowed.most for number in values):
            raise UsageError(f"{where}{name}: got {value}; wanted {allowed.words}.")
