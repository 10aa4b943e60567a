"""A sweep as data: which experiments, and which values each point sets. Nothing is built or checked here.

    Sweep(quickstart) * grid("loss.terms.kd.tail", ["tail_bucket", "truncated"]) * seeds(3)

`*` crosses a sweep with an axis, or filters it (`where`); `+` joins two sweeps. An axis is a list of choices, and a
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
MOST_REPEATED = 10_000  # draws in a row that were drawn before, after which no other one is expected


@dataclass(frozen=True)
class Axis:
    """Choices, each of which sets values by path; a name that begins with `fiddler:` holds a function instead.

    `draws` begins the endless draws of a random axis anew. Its choices are the first of them, repetitions included.
    """

    choices: tuple[Values, ...]
    draws: Callable[[], Iterator[Values]] | None = None

    def distinct(self) -> Sequence[Values]:
        """Returns the choices; of a random axis, the first draws that differ, as many as it has choices.

        Raises:
            UsageError: so many different draws do not come.
        """
        if self.draws is None:
            return self.choices
        found, repeated = list[Values](), 0
        for draw in self.draws():
            repeated = repeated + 1 if draw in found else 0
            if not repeated:
                found.append(draw)
            if len(found) == len(self.choices):
                break
            if repeated == MOST_REPEATED:
                raise UsageError(
                    f"random({', '.join(map(repr, draw))}): got {len(self.choices)} draws, of which only {len(found)} "
                    f"differ; equal ones would be one point. Draw {len(found)}, or from more values."
                )
        return found


@dataclass(frozen=True)
class Filter:
    """Keeps the points of whose values `keep` says so."""

    keep: Callable[[Values], bool]


@dataclass(frozen=True)
class Draft:
    """One point: a base experiment, and the values that the point sets in it, in order."""

    base: Base
    values: Values

    @property
    def experiment(self) -> str:
        """The base's name, with the arguments that it was given in advance."""
        if isinstance(self.base, functools.partial):
            named = (f"{name}={value!r}" for name, value in self.base.keywords.items())
            given = ", ".join([*map(repr, self.base.args), *named])
            return f"{self.base.func.__name__}({given})"
        return self.base.__name__

    def with_choice(self, choice: Values) -> "Draft":
        """With more values set.

        Raises:
            UsageError: a value would hide one that is set already.
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
        """Whether a filter keeps it."""
        seen = {EXPERIMENT: self.experiment, **self.values}
        try:
            return keep(seen)
        except KeyError as error:
            raise UsageError(f"where: a point has no value {error}; it has {', '.join(map(repr, seen))}.") from None


class Sweep:
    """Points of one or several experiments, in order.

    Raises:
        UsageError: what is given, crossed or joined is of another kind.
    """

    def __init__(self, *bases: Base) -> None:
        for base in bases:
            if not callable(base) or isinstance(base, fdl.Buildable):
                kind = f"a {type(base).__name__}"
                raise UsageError(f"Sweep: got {kind}; wanted experiments' functions, not called: Sweep(quickstart).")
        self.drafts = tuple(Draft(base, {}) for base in bases)

    @classmethod
    def _of(cls, drafts: Iterable[Draft]) -> "Sweep":
        made = cls()
        made.drafts = tuple(drafts)
        return made

    def __mul__(self, other: Axis | Filter) -> "Sweep":
        if isinstance(other, Filter):
            return self._of(draft for draft in self.drafts if draft.passes(other.keep))
        if not isinstance(other, Axis):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"Sweep * {other!r}: wanted an axis (grid, zipped, tied, random, fiddled, seeds) or where(…)."
            )
        choices = other.distinct()
        return self._of(draft.with_choice(choice) for draft in self.drafts for choice in choices)

    def __add__(self, other: "Sweep") -> "Sweep":
        if not isinstance(other, Sweep):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"Sweep + {type(other).__name__}: wanted another Sweep; an axis is crossed with *.")
        return self._of((*self.drafts, *other.drafts))

    def __len__(self) -> int:
        return len(self.drafts)

    def __iter__(self) -> Iterator[Draft]:
        return iter(self.drafts)


def _values(values: Iterable[Any], said: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable) or not (listed := list(values)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"{said}: got {values!r}; wanted a list of at least one value.")
    return [_plain(value) for value in listed]


def _plain(value: Any) -> Any:
    """Returns Python's own numbers and texts in place of numpy's, also within tuples and lists."""
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def grid(path: str, values: Iterable[Any]) -> Axis:
    """Each of the values at `path`, or at all that carry a tag (`tag:NAME`); a value may be a whole part, a config."""
    return Axis(tuple({path: value} for value in _values(values, f"grid({path!r})")))


def tied(paths: Sequence[str], values: Iterable[Any]) -> Axis:
    """Each of the values at all of `paths` at once."""
    return Axis(tuple(dict.fromkeys(paths, value) for value in _values(values, f"tied({paths!r})")))


def together(*axes: Axis) -> Axis:
    """Axes side by side: the first choices of all, then the second ones.

    Raises:
        UsageError: they differ in length, or set the same path.
    """
    lengths = [len(axis.choices) for axis in axes]
    if len(set(lengths)) != 1:
        raise UsageError(f"zipped: got {lengths} values; wanted as many for each path.")
    choices = tuple(map(_merged, zip(*(axis.choices for axis in axes), strict=True)))
    draws = [axis.draws for axis in axes if axis.draws is not None]
    if len(draws) < len(axes):
        return Axis(choices)
    return Axis(choices, lambda: map(_merged, zip(*(begin() for begin in draws), strict=True)))


def _merged(choices: Sequence[Values]) -> Values:
    merged = {path: value for choice in choices for path, value in choice.items()}
    if len(merged) != sum(len(choice) for choice in choices):
        raise UsageError(f"zipped: {', '.join(merged)} are set more than once. Name each path once.")
    return merged


def zipped(values: Mapping[str, Iterable[Any]]) -> Axis:
    """Several paths that change together: the first values of all, then the second ones."""
    return together(*(grid(path, each) for path, each in values.items()))


def random(path: str, sampler: Sampler, n: int, seed: int = 0) -> Axis:
    """`n` draws at `path`, a function of (path, seed): of more draws, the first `n` are the same.

    Draws that repeat an earlier one are left out where the axis is crossed with a sweep: equal points would be one. Of
    random axes side by side (`together`), those are left out that repeat in all of their values.
    """
    if n < 1:
        raise UsageError(f"random({path!r}): got {n} draws; wanted at least 1.")

    def draws() -> Iterator[Values]:
        source = Random(f"{seed} {path}")  # noqa: S311 (a search, not a secret)
        while True:
            yield {path: _plain(sampler(source))}

    return Axis(tuple(itertools.islice(draws(), n)), draws)


def uniform(low: float, high: float) -> Sampler:
    """Evenly between `low` and `high`, to three digits."""
    return lambda source: _three_digits(source.uniform(low, high))


def log_uniform(low: float, high: float) -> Sampler:
    """Evenly on a log scale between `low` and `high`, to three digits.

    Raises:
        UsageError: not 0 < low < high.
    """
    if not 0 < low < high:
        raise UsageError(f"log_uniform: got {low} and {high}; wanted 0 < low < high.")
    return lambda source: _three_digits(math.exp(source.uniform(math.log(low), math.log(high))))


def choice(*options: Any) -> Sampler:
    """One of the options, all equally likely."""
    listed = _values(options, "choice")
    return lambda source: source.choice(listed)


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def seeds(n: int) -> Axis:
    """Seeds 0 to n − 1: the axis that result tables take means over."""
    n = _plain(n)
    if not isinstance(n, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"seeds: got {n!r}; wanted how many, as seeds(3); for others: grid('seed', [7, 8]).")
    return grid("seed", range(n))


def fiddled(*fiddlers: Callable[[Any], None] | None, name: str = "change") -> Axis:
    """The graph as each of the functions leaves it; None leaves it as it is. `name` heads the column."""
    for fiddler in fiddlers:
        if fiddler is not None and not callable(fiddler):
            raise UsageError(f"fiddled: got {fiddler!r}; wanted functions that change a config, or None.")
    return Axis(tuple({FIDDLER + name: fiddler} for fiddler in _values(fiddlers, "fiddled")))


def where(keep: Callable[[Values], bool]) -> Filter:
    """Only the points of whose values (by path; the base's name as `experiment`) `keep` is true."""
    return Filter(keep)
