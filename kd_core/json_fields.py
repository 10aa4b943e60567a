"""Checks of fields in untrusted JSON: each has its exact type and is in bounds, or an error names it.

Every check returns the value, or raises a `ValueError` with the field's name.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, cast

LARGEST = 1 << 64
SHA256 = re.compile(r"[0-9a-f]{64}")


def check_integer(value: Any, name: str, least: int, most: int) -> int:
    """Checks an integer and its bounds. No bool, float or string passes."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {short_repr(value)}; wanted a whole number from {least} to {most}")
    return value


def check_number(value: Any, name: str) -> float:
    """Checks a finite number."""
    # Compare the size first: `isfinite` overflows for an integer of hundreds of digits.
    if type(value) not in (int, float) or (type(value) is int and abs(value) > LARGEST) or not math.isfinite(value):
        raise ValueError(f"{name}: {short_repr(value)}; wanted a finite number")
    return value


def check_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: {short_repr(value)}; wanted a string")
    return value


def check_digest(value: Any, name: str) -> str:
    """Checks a hexadecimal sha256."""
    if not SHA256.fullmatch(check_text(value, name)):
        raise ValueError(f"{name}: {short_repr(value)}; wanted 64 hexadecimal digits")
    return value


def check_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: {short_repr(value)}; wanted a list")
    return cast(list[Any], value)


def check_object(value: Any, name: str, expected: Iterable[str] | None = None) -> dict[str, Any]:
    """Checks an object. With `expected`, it must have exactly these fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {short_repr(value)}; wanted an object")
    by_name = cast(dict[str, Any], value)
    if expected is not None and (differing := sorted(set(expected) ^ set(by_name))):
        word = "unknown" if differing[0] in by_name else "missing"
        raise ValueError(f"{name}: field {short_repr(differing[0])} is {word}")
    return by_name


def short_repr(value: Any) -> str:
    """Returns a value as text for a message: short and on one line, whatever the value is."""
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    words = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return words if len(words) <= 60 else words[:57] + "…"
