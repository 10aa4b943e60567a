"""Fields of JSON that somebody else may have written: each of its exact type and in bounds, or refused by name."""

import math
import re
from collections.abc import Iterable
from typing import Any, cast

LARGEST = 1 << 64
SHA256 = re.compile(r"[0-9a-f]{64}")


def integer(value: Any, name: str, least: int, most: int) -> int:
    """An integer in bounds; no bool, float or string passes for one."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {shown(value)}; wanted a whole number from {least} to {most}")
    return value


def number(value: Any, name: str) -> float:
    """A finite number."""
    # The size is asked for first: an integer of hundreds of digits is no float.
    if type(value) not in (int, float) or (type(value) is int and abs(value) > LARGEST) or not math.isfinite(value):
        raise ValueError(f"{name}: {shown(value)}; wanted a finite number")
    return value


def text(value: Any, name: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: {shown(value)}; wanted a string")
    return value


def digest(value: Any, name: str) -> str:
    """A hexadecimal sha256."""
    if not SHA256.fullmatch(text(value, name)):
        raise ValueError(f"{name}: {shown(value)}; wanted 64 hexadecimal digits")
    return value


def items(value: Any, name: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise ValueError(f"{name}: {shown(value)}; wanted a list")
    return cast(list[Any], value)


def fields(value: Any, name: str, wanted: Iterable[str] | None = None) -> dict[str, Any]:
    """An object; where `wanted` is given, with these fields and no others."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {shown(value)}; wanted an object")
    found = cast(dict[str, Any], value)
    if wanted is not None and (differing := sorted(set(wanted) ^ set(found))):
        word = "unknown" if differing[0] in found else "missing"
        raise ValueError(f"{name}: field {shown(differing[0])} is {word}")
    return found


def shown(value: Any) -> str:
    """A value for a message: short, on one line, whatever it is."""
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    words = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return words if len(words) <= 60 else words[:57] + "…"
