"""Points of a sweep: its drafts, resolved. A point's id is the hash of its frozen record, so of what it trains.

base() → --config items → swept values, in order → check that none was hidden → record → id
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
from experiments.config.paths import check_values, find_place, set_value
from kd_core.errors import UsageError

ID_LENGTH = 12


@dataclass(frozen=True)
class Point:
    """A fully resolved experiment of a sweep."""

    id: str
    values: Values
    config: fdl.Config[Any]
    record: str

    @property
    def steps(self) -> int:
        return int(self.config.steps)

    @property
    def tokens(self) -> int:
        """Returns the number of positions that the point trains on."""
        return self.steps * int(self.config.tokens_per_step)

    @functools.cached_property
    def hash_without_seed(self) -> str:
        """Returns a hash of the record with a seed of 0, equal for points that differ only in their seed."""
        config = self.config.__deepcopy__({})
        config.seed = 0
        return hashlib.sha256(config_items.record_json(config).encode()).hexdigest()

    @functools.cached_property
    def validation_metrics(self) -> set[str]:
        """Returns the names of the metrics of its validation.

        Raises:
            UsageError: as in `build`.
        """
        return self.build().validation_metrics()

    def build(self) -> Experiment:
        """Builds the experiment.

        Raises:
            UsageError: values that make no sense together.
        """
        try:
            return fdl.build(self.config)
        except UsageError as error:
            raise UsageError(str(error).partition("\n\nFiddle context: ")[0]) from None


def table_text(value: Any) -> str:
    """Returns a value as tables show it: a config by its class and set values, a function by its name."""
    if isinstance(value, fdl.Buildable):
        arguments = ", ".join(f"{name}={table_text(argument)}" for name, argument in value.__arguments__.items())
        return f"{fdl.get_callable(value).__name__}({arguments})"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return str(value)


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Returns, by path, the shortest dotted ending that no other path has."""
    all_paths = list(paths)

    def ending(path: str, length: int) -> str:
        return ".".join(path.split(".")[-length:])

    def shortest(path: str) -> str:
        for length in range(1, path.count(".") + 2):
            if sum(ending(other, length) == ending(path, length) for other in all_paths) == 1:
                return ending(path, length)
        return path

    return {path: shortest(path) for path in all_paths}


def swept_paths(points: Iterable[Point]) -> list[str]:
    """Returns the paths that the points set, in order of first use. The experiment is among them if it varies."""
    points = list(points)
    paths = list(dict.fromkeys(path for point in points for path in point.values))
    if len({point.values[EXPERIMENT] for point in points}) == 1:
        paths.remove(EXPERIMENT)
    return paths


def point_label(point: Point, paths: Sequence[str]) -> str:
    """Returns a point's values at `paths` in one line, as `tail=renormalized top_k=8`."""
    names = short_names(paths)
    return (
        " ".join(f"{names[path]}={table_text(point.values[path])}" for path in paths if path in point.values)
        or point.id
    )


def resolve_points(sweep: Sweep, items: Sequence[str], name: str) -> list[Point]:
    """Resolves all points of a sweep, and applies `items` to each: `--config` items that name no experiment.

    Raises:
        UsageError: no sweep, an unknown path, a value of another type, an override that hides a swept value or is
            hidden by one, two points of the same graph, or no points.
    """
    if not isinstance(sweep, Sweep):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"--sweep={name}: returned {user_code.shown_kind(sweep)}, wanted a Sweep.")
    points: dict[str, Point] = {}
    for draft in sweep:
        point = _resolve(draft, items, name)
        if (earlier := points.get(key := _with_equal_numbers(point.record))) is not None:
            one, other = (
                f"({', '.join(f'{k}={table_text(v)}' for k, v in p.values.items())})" for p in (earlier, point)
            )
            raise UsageError(f"--sweep={name}: {one} and {other} are the same experiment. Leave one of them out.")
        points[key] = point
    if not points:
        raise UsageError(f"--sweep={name}: has no points. Give it axes that hold values, and filters that keep some.")
    return list(points.values())


def _with_equal_numbers(record: str) -> str:
    """Returns a record in which equal numbers are written alike: 1 and 1.0, 0.0 and -0.0."""

    def number(text: str) -> int | float:
        return int(value) if (value := float(text)).is_integer() else value

    return json.dumps(json.loads(record, parse_float=number))


def _base_config(draft: Draft, name: str) -> fdl.Config[Any]:
    config: Any = user_code.call_function(draft.base, f"--sweep={name}: {draft.experiment}")
    target: Any = fdl.get_callable(config) if isinstance(config, fdl.Buildable) else type(config)
    kind = getattr(target, "__name__", str(target))
    if target is not Experiment:
        raise UsageError(f"--sweep={name}: {draft.experiment} gives a {kind}, wanted an {Experiment.__name__}.")
    return cast(fdl.Config[Any], config)


def _resolve(draft: Draft, items: Sequence[str], name: str) -> Point:
    resolved = Resolved(_base_config(draft, name), draft.experiment)
    for item in items:
        config_items.apply(resolved, item)
    config = resolved.config
    # A fiddler makes another base, which the sweep may change. A value that an item sets by name must stay.
    overrides = config_items.items_by_path(resolved)
    applied = {path: find_place(config, path, item).value for path, item in overrides.items()}
    for swept, value in draft.values.items():
        error_prefix = f"--sweep={name}: {swept}={table_text(value)}"
        if not swept.startswith(FIDDLER):
            paths = _paths_of(config, swept, error_prefix)
            _refuse_hiding(overrides, swept, paths)
            for path in paths:
                if path in applied:  # swept twice, once by a tag that it carries
                    raise UsageError(f"{error_prefix} would hide the swept {path}. Sweep each value in one place.")
                set_value(config, path, value, error_prefix)
                applied[path] = find_place(config, path, error_prefix).value
        elif value is not None:
            user_code.call_function(value, error_prefix, config)
    # Check that nothing was hidden before the home folder is written out, which changes values.
    check_values(config, recorded=True)
    _refuse_hidden(config, applied, draft, name)
    config_items.expand_home(resolved)
    record = config_items.record_json(config)
    point_id = hashlib.sha256(record.encode()).hexdigest()[:ID_LENGTH]
    return Point(point_id, {EXPERIMENT: draft.experiment, **draft.values}, config, record)


def _paths_of(config: fdl.Config[Any], swept: str, error_prefix: str) -> list[str]:
    """Returns the paths of a swept name: all that carry the tag, or the name itself."""
    prefix = catalog.PREFIXES[catalog.TAG]
    if not swept.startswith(prefix):
        return [swept]
    return [place.path for place in config_items.find_tagged(config, swept.removeprefix(prefix), error_prefix)]


def _refuse_hiding(overrides: dict[str, str], swept: str, paths: list[str]) -> None:
    """Refuses an item that a swept value would hide, or that would hide one.

    It sets the swept path itself, a value inside of a swept part, or a part around the swept path.
    """
    for path, item in overrides.items():
        if any(
            f"{path}.".startswith(f"{swept_path}.") or f"{swept_path}.".startswith(f"{path}.") for swept_path in paths
        ):
            raise UsageError(f"{item}: {swept} is swept, so it cannot be overridden. Change the sweep instead.")


def _refuse_hidden(config: fdl.Config[Any], values: Values, draft: Draft, name: str) -> None:
    """Refuses values that a later choice has hidden: a swept function, or a part that is swept after its values."""
    for path, value in values.items():
        current = find_place(config, path, f"--sweep={name}").value
        if current != value and current is not value:  # NaN differs from itself
            raise UsageError(
                f"--sweep={name}: {path}={table_text(value)} was hidden: a later choice of {draft.experiment} left "
                f"{table_text(current)} there. Sweep each value in one place."
            )
