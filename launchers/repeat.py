"""What differs between a run and the recorded one that it repeats (`--config=run:RUN_DIR`), said before it starts."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl

from kd_core.errors import UsageError
from kd_core.training.run_folder import UNKNOWN_COMMIT, RunFolder, read_settings
from launchers.config_items import Resolved, shown, written
from launchers.values import walk

DEFAULT = "default of "


def _pairs(what: str, then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield f"{what} {name}: {then.get(name, 'not recorded')} there, {now.get(name, 'none')} now"


def _layout(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.get("world", {}).items() if name != "pid"}


def _of_code(then: str, now: str) -> Iterator[str]:
    """The commits; equal names say nothing where changes were not committed, or nothing is known."""
    yield from _pairs("code", {"commit": then}, {"commit": now})
    if then == now == UNKNOWN_COMMIT:
        yield "code commit: not known, for neither ran in a git checkout; it may differ"
    if then == now and now.endswith("-dirty"):
        yield f"code commit: {now} both times, with changes that are not committed and may differ"


def _of_settings(settings: dict[str, tuple[str, str]], resolved: Resolved) -> Iterator[str]:
    """Items given after `run:`; settings that are newer than the record; defaults that are others today."""
    for place in walk(resolved.config):
        if isinstance(place.value, dict) or not isinstance(place.node, fdl.Buildable):
            continue
        now = shown(place)
        was, who = settings.get(place.path, ("", ""))
        owner = fdl.get_callable(place.node)
        today = inspect.signature(owner).parameters[place.name].default
        if place.path not in settings:
            yield f"setting {place.path}: not in the record; {now} now, the default"
        elif was != now:
            yield f"setting {place.path}: {was} there, {now} now ({resolved.set_by.get(place.path, '?')})"
        elif who.startswith(DEFAULT) and written(today) != was and not place.is_part:
            yield f"default of {owner.__name__}.{place.name}: {was} there, which is kept; {today!r} in today's code"


def differences(resolved: Resolved, facts: dict[str, Any], then: dict[str, Any], config_text: str) -> list[str]:
    """A line each: code, versions, layout, data, settings and defaults."""
    return [
        *_of_code(then.get("commit", "not recorded"), facts["commit"]),
        *_pairs("version of", {"python": then.get("python")}, {"python": facts["python"]}),
        *_pairs("version of", then.get("versions", {}), facts["versions"]),
        *_pairs("layout", _layout(then), _layout(facts)),
        *_pairs("data", _hashes(then), _hashes(facts)),
        *_of_settings(read_settings(config_text), resolved),
    ]


def _hashes(facts: dict[str, Any]) -> dict[str, str]:
    return {name: f"sha256 {each['sha256'][:12]}…" for name, each in facts.get("inputs", {}).items()}


def report(resolved: Resolved, facts: dict[str, Any]) -> str:
    """What to say before the run starts, as lines."""
    folder = resolved.repeats or Path()
    run = RunFolder(folder)
    if not (then := run.last_facts()):
        raise UsageError(f"{folder}: no attempts/ there, so what it ran on is not known; use config_file: instead.")
    found = differences(resolved, facts, then, run.settings_text())
    if not found:
        return f"repeats {folder} with the same code, versions, layout, data and settings: the same bits are expected"
    return "\n".join([f"differs from the run it repeats, {folder}:", *(f"  {line}" for line in found)])
