"""Points: a sweep's drafts, resolved. A point is known by the hash of its frozen record, so by what it trains.

base() → --config items → swept values, in order → every one of them still stands → record → id
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import fiddle as fdl

from experiments.base.experiment import Experiment
from experiments.base.sweep_definition import EXPERIMENT, FIDDLER, Draft, Sweep, Values
from experiments.config import catalog, config_items, user_code
from experiments.config.config_items import Resolved
from experiments.config.paths import check_values, find, set_value
from kd_core.errors import UsageError

ID_LENGTH = 12


@dataclass(frozen=True)
class Point:
    """An experiment of a sweep, fully resolved."""

    id: str
    values: Values
    config: fdl.Config[Any]
    record: str

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return int(self.config.steps)

    @property
    def tokens(self) -> int:
        """Positions that it trains on."""
        return self.steps * int(self.config.tokens_per_step)

    @functools.cached_property
    def but_for_the_seed(self) -> str:
        """A hash of the record with a seed of 0: the same for points that differ in nothing else."""
        config = self.config.__deepcopy__({})
        config.seed = 0
        return hashlib.sha256(config_items.record(config).encode()).hexdigest()

    @functools.cached_property
    def validation_metrics(self) -> set[str]:
        """Names of what its validation gives; errors as in `build`."""
        return self.build().validation_metrics()

    def build(self) -> Experiment:
        """The experiment.

        Raises:
            UsageError: values that make no sense together.
        """
        try:
            return fdl.build(self.config)
        except UsageError as error:
            raise UsageError(str(error).partition("\n\nFiddle context: ")[0]) from None


def shown(value: Any) -> str:
    """A value as tables show it: a config by its class and what it sets, a function by its name."""
    if isinstance(value, fdl.Buildable):
        given = ", ".join(f"{name}={shown(each)}" for name, each in value.__arguments__.items())
        return f"{fdl.get_callable(value).__name__}({given})"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return str(value)


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Each path by as few of its last names as tell it from the others."""
    listed = list(paths)

    def ending(path: str, length: int) -> str:
        return ".".join(path.split(".")[-length:])

    def shortest(path: str) -> str:
        for length in range(1, path.count(".") + 2):
            if sum(ending(other, length) == ending(path, length) for other in listed) == 1:
                return ending(path, length)
        return path

    return {path: shortest(path) for path in listed}


def swept_paths(points: Iterable[Point]) -> list[str]:
    """What the points set, in the order in which they set it; the experiment where there are several."""
    points = list(points)
    paths = list(dict.fromkeys(path for point in points for path in point.values))
    if len({point.values[EXPERIMENT] for point in points}) == 1:
        paths.remove(EXPERIMENT)
    return paths


def label(point: Point, paths: Sequence[str]) -> str:
    """`tail=renormalized top_k=8`: the point's values at `paths` in one line."""
    names = short_names(paths)
    return " ".join(f"{names[path]}={shown(point.values[path])}" for path in paths if path in point.values) or point.id


def resolve(sweep: Sweep, items: Sequence[str], name: str) -> list[Point]:
    """All points, with `items` (`--config` items that are no experiments) applied to each.

    Raises:
        UsageError: no sweep, an unknown path, a value of another type, an override that hides a swept value or is
            hidden by one, two points of the same graph, or no points.
    """
    if not isinstance(sweep, Sweep):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"--sweep={name}: returned {user_code.shown_kind(sweep)}, wanted a Sweep.")
    points: dict[str, Point] = {}
    for draft in sweep:
        point = _resolve(draft, items, name)
        if (same := points.get(key := _by_value(point.record))) is not None:
            one, other = (f"({', '.join(f'{k}={shown(v)}' for k, v in p.values.items())})" for p in (same, point))
            raise UsageError(f"--sweep={name}: {one} and {other} are the same experiment. Leave one of them out.")
        points[key] = point
    if not points:
        raise UsageError(f"--sweep={name}: has no points. Give it axes that hold values, and filters that keep some.")
    return list(points.values())


def _by_value(record: str) -> str:
    """Returns a record in which equal numbers are written alike: 1 and 1.0, 0.0 and -0.0."""

    def number(text: str) -> int | float:
        return int(value) if (value := float(text)).is_integer() else value

    return json.dumps(json.loads(record, parse_float=number))


def _base(draft: Draft, name: str) -> fdl.Config[Any]:
    config: Any = user_code.of(draft.base, f"--sweep={name}: {draft.experiment}")
    made: Any = fdl.get_callable(config) if isinstance(config, fdl.Buildable) else type(config)
    kind = getattr(made, "__name__", str(made))
    if made is not Experiment:
        raise UsageError(f"--sweep={name}: {draft.experiment} gives a {kind}, wanted an {Experiment.__name__}.")
    return cast(fdl.Config[Any], config)


def _resolve(draft: Draft, items: Sequence[str], name: str) -> Point:
    resolved = Resolved(_base(draft, name), draft.experiment)
    for item in items:
        config_items.apply(resolved, item)
    config = resolved.config
    # A fiddler makes another base, which the sweep may change; a value that is named must stay.
    given = {path: item for path, item in resolved.set_by.items() if item.startswith("--config=")}
    set_here = {path: find(config, path, item).value for path, item in given.items()}
    for swept, value in draft.values.items():
        said = f"--sweep={name}: {swept}={shown(value)}"
        if not swept.startswith(FIDDLER):
            paths = _paths(config, swept, said)
            _refuse_hiding(given, swept, paths)
            for path in paths:
                if path in set_here:  # by another name: a tag that it carries
                    raise UsageError(f"{said} would hide the swept {path}. Sweep each value in one place.")
                set_value(config, path, value, said)
                set_here[path] = find(config, path, said).value
        elif value is not None:
            user_code.of(value, said, config)
    check_values(config, recorded=True)
    _all_stand(config, set_here, draft, name)
    config_items.expand_home(resolved)
    record = config_items.record(config)
    point_id = hashlib.sha256(record.encode()).hexdigest()[:ID_LENGTH]
    return Point(point_id, {EXPERIMENT: draft.experiment, **draft.values}, config, record)


def _paths(config: fdl.Config[Any], swept: str, said: str) -> list[str]:
    """A swept name as paths: all that carry the tag, or itself."""
    prefix = catalog.PREFIXES[catalog.TAG]
    if not swept.startswith(prefix):
        return [swept]
    return [place.path for place in config_items.tagged(config, swept.removeprefix(prefix), said)]


def _refuse_hiding(given: dict[str, str], swept: str, paths: list[str]) -> None:
    """An item for a swept path would hide it or be hidden by it; so would one for a value of a part that is swept."""
    for path, item in given.items():
        if any(f"{path}.".startswith(f"{each}.") or f"{each}.".startswith(f"{path}.") for each in paths):
            raise UsageError(f"{item}: {swept} is swept, so it cannot be overridden. Change the sweep instead.")


def _all_stand(config: fdl.Config[Any], values: Values, draft: Draft, name: str) -> None:
    """A function that is swept, or a part that is swept after its values, may have hidden what was set before."""
    for path, value in values.items():
        found = find(config, path, f"--sweep={name}").value
        if found != value and found is not value:  # not a number is not even itself
            raise UsageError(
                f"--sweep={name}: {path}={shown(value)} was hidden: a later choice of {draft.experiment} left "
                f"{shown(found)} there. Sweep each value in one place."
            )
