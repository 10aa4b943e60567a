"""Shell-like patterns of parameter and module names (`layers.3.*`, `q_proj`). One that matches nothing is an error."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from kd_core.errors import UsageError


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def matches(name: str, pattern: str) -> bool:
    """Checks whether a pattern matches the whole name, or the rest of it after one of its dots."""
    return any(fnmatch.fnmatchcase(ending, pattern) for ending in _endings(name))


def match_names(names: Iterable[str], patterns: Sequence[str], where: str) -> list[str]:
    """Returns the names that any pattern matches, in their order.

    Raises:
        UsageError: a pattern matches none. The message suggests the nearest names.
    """
    names = list(names)
    endings = {ending for name in names for ending in _endings(name)}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(ending, pattern) for ending in endings):
            near = difflib.get_close_matches(pattern, sorted(endings), n=3, cutoff=0.4)
            hint = f"Near it: {', '.join(near)}." if near else f"Names are like {', '.join(names[:2])}."
            raise UsageError(f"{where}: {pattern!r} matches nothing. {hint}")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]
