"""Sweeps as data: the experiments, and the values that each point sets. Nothing is built or checked here.

    Sweep(quickstart) * grid("loss.terms.kd.tail", ["tail_bucket", "truncated"]) * seeds(3)

`*` crosses a sweep with an axis, or filters it (`where`). `+` joins two sweeps. An axis is a list of choices, and a
choice sets one path or several. `launchers.sweep` resolves the points against the experiments' graphs.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import fiddle as fdl
import numpy as np

from kd_core.errors import UsageError

Base = Callable[[], fdl.Config[Any]]
Values = dict[str, Any]
Sampler = Callable[[Random], Any]
EXPERIMENT, FIDDLER = "experiment", "fiddler:"
MOST_REPEATED = 10_000  # repeated draws in a row after which no new one is expected


@dataclass(frozen=True)
class Axis:
    """Choices of an axis. Each sets values by path, or holds a function under a name that begins with `fiddler:`.

    `draws` restarts the endless draws of a random axis. Its choices are the first of them, repetitions included.
    """

    choices: tuple[Values, ...]
    draws: Callable[[], Iterator[Values]] | None = None

    def distinct(self) -> Sequence[Values]:
        """Returns the choices. A random axis returns as many distinct draws as it has choices.

        Raises:
            UsageError: there are not so many distinct draws.
        """
        if self.draws is None:
            return self.choices
        draws, repeated = list[Values](), 0
        for draw in self.draws():
            repeated = repeated + 1 if draw in draws else 0
            if not repeated:
                draws.append(draw)
            if len(draws) == len(self.choices):
                break
            if repeated == MOST_REPEATED:
                raise UsageError(
                    f"random({', '.join(map(repr, draw))}): got {len(self.choices)} draws, of which only {len(draws)} "
                    f"differ, and equal ones would be one point. Draw {len(draws)}, or from more values."
                )
        return draws


@dataclass(frozen=True)
class Filter:
    """A filter that keeps the points for whose values `keep` returns True."""

    keep: Callable[[Values], bool]


@dataclass(frozen=True)
class Draft:
    """A point before it is resolved: a base experiment, and the values that the point sets in it, in order."""

    base: Base
    values: Values

    @property
    def experiment(self) -> str:
        """Returns the base's name, with the arguments of a partial function."""
        if isinstance(self.base, functools.partial):
            keywords = (f"{name}={value!r}" for name, value in self.base.keywords.items())
            arguments = ", ".join([*map(repr, self.base.args), *keywords])
            return f"{self.base.func.__name__}({arguments})"
        return self.base.__name__

    def with_choice(self, choice: Values) -> "Draft":
        """Returns the point with a choice's values set as well.

        Raises:
            UsageError: a value would hide one that is already set.
        """
        for path in choice:
            for earlier in self.values:
                if path == earlier or earlier.startswith(f"{path}."):
                    raise UsageError(
                        f"sweep of {self.experiment}: {path} would hide the swept {earlier}. "
                        "Sweep each value once, and a whole part before its values."
                    )
        return Draft(self.base, {**self.values, **choice})

    def passes(self, keep: Callable[[Values], bool]) -> bool:
        """Returns what the filter function returns for the point's values.

        Raises:
            UsageError: the function asks for a value that the point does not set.
        """
        values = {EXPERIMENT: self.experiment, **self.values}
        try:
            return keep(values)
        except KeyError as error:
            raise UsageError(f"where: a point has no value {error}; it has {', '.join(map(repr, values))}.") from None


class Sweep:
    """The points of one or several experiments, in order.

    Raises:
        UsageError: a base, an axis or another sweep is of the wrong type.
    """

    def __init__(self, *bases: Base) -> None:
        for base in bases:
            if not callable(base) or isinstance(base, fdl.Buildable):
                kind = f"a {type(base).__name__}"
                raise UsageError(f"Sweep: got {kind}; wanted experiments' functions, not called: Sweep(quickstart).")
        self.drafts = tuple(Draft(base, {}) for base in bases)

    @classmethod
    def _from_drafts(cls, drafts: Iterable[Draft]) -> "Sweep":
        sweep = cls()
        sweep.drafts = tuple(drafts)
        return sweep

    def __mul__(self, other: Axis | Filter) -> "Sweep":
        if isinstance(other, Filter):
            return self._from_drafts(draft for draft in self.drafts if draft.passes(other.keep))
        if not isinstance(other, Axis):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"Sweep * {other!r}: wanted an axis (grid, zipped, tied, random, fiddled, seeds) or where(…)."
            )
        choices = other.distinct()
        return self._from_drafts(draft.with_choice(choice) for draft in self.drafts for choice in choices)

    def __add__(self, other: "Sweep") -> "Sweep":
        if not isinstance(other, Sweep):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"Sweep + {type(other).__name__}: wanted another Sweep; an axis is crossed with *.")
        return self._from_drafts((*self.drafts, *other.drafts))

    def __len__(self) -> int:
        return len(self.drafts)

    def __iter__(self) -> Iterator[Draft]:
        return iter(self.drafts)


def _check_values(values: Iterable[Any], error_prefix: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable) or not (listed := list(values)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"{error_prefix}: got {values!r}; wanted a list of at least one value.")
    return [_to_python(value) for value in listed]


def _to_python(value: Any) -> Any:
    """Converts numpy's numbers and texts to Python's own, also within tuples and lists."""
    if type(value) in (tuple, list):
        return type(value)(map(_to_python, value))
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def grid(path: str, values: Iterable[Any]) -> Axis:
    """Sets each of the values at `path`, or at every value with a tag (`tag:NAME`). A value may be a whole config."""
    return Axis(tuple({path: value} for value in _check_values(values, f"grid({path!r})")))


def tied(paths: Sequence[str], values: Iterable[Any]) -> Axis:
    """Sets each of the values at all of `paths` at once."""
    return Axis(tuple(dict.fromkeys(paths, value) for value in _check_values(values, f"tied({paths!r})")))


def together(*axes: Axis) -> Axis:
    """Joins axes side by side: the first choices of all axes together, then the second ones, and so on.

    Raises:
        UsageError: the axes differ in length, or set the same path.
    """
    lengths = [len(axis.choices) for axis in axes]
    if len(set(lengths)) != 1:
        raise UsageError(f"zipped: got {lengths} values; wanted equally many for each path.")
    choices = tuple(map(_merge, zip(*(axis.choices for axis in axes), strict=True)))
    draws = [axis.draws for axis in axes if axis.draws is not None]
    if len(draws) < len(axes):
        return Axis(choices)
    return Axis(choices, lambda: map(_merge, zip(*(begin() for begin in draws), strict=True)))


def _merge(choices: Sequence[Values]) -> Values:
    merged = {path: value for choice in choices for path, value in choice.items()}
    if len(merged) != sum(len(choice) for choice in choices):
        raise UsageError(f"zipped: {', '.join(merged)} are set more than once. Name each path once.")
    return merged


def zipped(values: Mapping[str, Iterable[Any]]) -> Axis:
    """Changes several paths together: the first values of all paths, then the second ones, and so on."""
    return together(*(grid(path, path_values) for path, path_values in values.items()))


def random(path: str, sampler: Sampler, n: int, seed: int = 0) -> Axis:
    """Sets `n` random draws at `path`. They are a function of (path, seed), and a larger `n` begins with the same ones.

    Where the axis is crossed with a sweep, draws that repeat an earlier one are replaced by further draws, because
    equal points would be one. Of random axes side by side (`together`), a draw repeats only if all of its values do.
    """
    if n < 1:
        raise UsageError(f"random({path!r}): got {n} draws; wanted at least 1.")

    def draws() -> Iterator[Values]:
        source = Random(f"{seed} {path}")  # noqa: S311 (a search, not a secret)
        while True:
            yield {path: _to_python(sampler(source))}

    return Axis(tuple(itertools.islice(draws(), n)), draws)


def uniform(low: float, high: float) -> Sampler:
    """Returns a sampler that draws uniformly between `low` and `high`, rounded to three digits."""
    return lambda source: _round_to_three_digits(source.uniform(low, high))


def log_uniform(low: float, high: float) -> Sampler:
    """Returns a sampler that draws uniformly on a log scale between `low` and `high`, rounded to three digits.

    Raises:
        UsageError: 0 < low < high does not hold.
    """
    if not 0 < low < high:
        raise UsageError(f"log_uniform: got {low} and {high}; wanted 0 < low < high.")
    return lambda source: _round_to_three_digits(math.exp(source.uniform(math.log(low), math.log(high))))


def choice(*options: Any) -> Sampler:
    """Returns a sampler that draws one of the options, all of them equally likely."""
    listed = _check_values(options, "choice")
    return lambda source: source.choice(listed)


def _round_to_three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def seeds(n: int) -> Axis:
    """Sets seeds 0 to n − 1. Result tables take means over this axis."""
    n = _to_python(n)
    if not isinstance(n, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"seeds: got {n!r}; wanted how many, as seeds(3); for others: grid('seed', [7, 8]).")
    return grid("seed", range(n))


def fiddled(*fiddlers: Callable[[Any], None] | None, name: str = "change") -> Axis:
    """Applies each of the functions to the graph. None leaves the graph as it is. `name` heads the column."""
    for fiddler in fiddlers:
        if fiddler is not None and not callable(fiddler):
            raise UsageError(f"fiddled: got {fiddler!r}; wanted functions that change a config, or None.")
    return Axis(tuple({FIDDLER + name: fiddler} for fiddler in _check_values(fiddlers, "fiddled")))


def where(keep: Callable[[Values], bool]) -> Filter:
    """Keeps the points for whose values `keep` returns True. They are by path, with the base's name as `experiment`."""
    return Filter(keep)
