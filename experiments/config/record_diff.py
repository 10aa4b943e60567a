"""What differs between a run and the recorded one that it repeats (`--config=run:RUN_DIR`), said before it starts."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl

from experiments.config.config_items import Resolved, shown, written
from experiments.config.paths import walk
from experiments.config.user_files import source_hash
from kd_core.errors import UsageError
from kd_core.training.run_folder import UNKNOWN_COMMIT, RunFolder, read_settings

DEFAULT = "default of "
MOST_FILES = 10


def _pairs(what: str, then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield f"{what} {name}: {then.get(name, 'not recorded')} there, {now.get(name, 'none')} now"


def _layout(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.get("world", {}).items() if name != "pid"}


def of_code(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the source files that differ, a line each, and the commits; without hashes the commits alone."""
    if not (then.get("sources") and now.get("sources")):
        return list(_of_commits(then.get("commit", "not recorded"), now["commit"]))
    files = list(
        _pairs("code", *({name: _short(sha) for name, sha in each["sources"].items()} for each in (then, now)))
    )
    rest = [f"code: {len(files) - MOST_FILES} more files"] if len(files) > MOST_FILES else []
    return files and [
        *files[:MOST_FILES],
        *rest,
        *_pairs("code", *({"commit": each["commit"]} for each in (then, now))),
    ]


def _short(digest: str) -> str:
    return f"sha256 {digest[:12]}…"


def _of_commits(then: str, now: str) -> Iterator[str]:
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
        *of_code(then, facts),
        *_pairs("version of", {"python": then.get("python")}, {"python": facts["python"]}),
        *_pairs("version of", then.get("versions", {}), facts["versions"]),
        *_pairs("layout", _layout(then), _layout(facts)),
        *_pairs("data", _hashes(then), _hashes(facts)),
        *_of_settings(read_settings(config_text), resolved),
    ]


def _hashes(facts: dict[str, Any]) -> dict[str, str]:
    return {name: _short(each["sha256"]) for name, each in facts.get("inputs", {}).items()}


def _of_user_files(then: dict[str, Any], settings: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Yields a line for each user file that is another one today; what the record holds of it is what runs."""
    for name, recorded in then["user_files"].items():
        path = Path(recorded["path"])
        today = source_hash(path) if path.is_file() else None
        if today == recorded["sha256"]:
            continue
        how = "is gone" if today is None else f"was edited ({_short(recorded['sha256'])} there, {_short(today)} now)"
        runs = "recorded text runs" if f"code of {name}" in settings else "values that it set are in the record"
        yield f"{path} {how}; the {runs}"


def report(resolved: Resolved, facts: dict[str, Any]) -> str:
    """What to say before the run starts, as lines."""
    folder = resolved.repeats or Path()
    run = RunFolder(folder)
    if not (then := run.last_facts()):
        raise UsageError(f"{folder}: no attempts/ there, so what it ran on is not known; use config_file: instead.")
    found = differences(resolved, facts, then, run.settings_text())
    edited = _of_user_files(then, read_settings(run.settings_text()))
    if not found:
        same = f"repeats {folder} with the same code, versions, layout, data and settings: the same bits are expected"
        return "\n".join([same, *edited])
    if any(line.startswith("code ") for line in found) and (patch := run.attempts()[-1] / "changes.diff").exists():
        found.append(f"what it had beyond its commit: {patch}")
    return "\n".join([f"differs from the run it repeats, {folder}:", *(f"  {line}" for line in found), *edited])


def differences_before(run: RunFolder, resolved: Resolved, facts: dict[str, Any]) -> list[str]:
    """Returns lines for the start of a run: what differs from the run that it repeats, and from its own last start."""
    lines = report(resolved, facts).splitlines() if resolved.repeats else []
    with contextlib.suppress(UsageError):  # facts that are damaged keep no run from going on
        if last := run.last_facts():
            lines += [f"resumed with other code: {line}" for line in of_code(last, facts)]
    return lines
