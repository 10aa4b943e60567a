"""Differences between a run and the recorded run that it repeats (`--config=run:RUN_DIR`), shown before it starts."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl

from experiments.config.config_items import Resolved, stable_text, value_text
from experiments.config.paths import walk
from experiments.config.user_files import source_hash
from kd_core.errors import UsageError
from kd_core.training.run_folder import UNKNOWN_COMMIT, RunFolder, read_settings

DEFAULT = "default of "
MOST_FILES = 10


def _changes(subject: str, then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield f"{subject} {name}: {then.get(name, 'not recorded')} there, {now.get(name, 'none')} now"


def _layout(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.get("world", {}).items() if name != "pid"}


def code_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a line per source file that differs, then the commits. Where either has no hashes, only the commits."""
    if not (then.get("sources") and now.get("sources")):
        return list(_of_commits(then.get("commit", "not recorded"), now["commit"]))
    files = list(
        _changes("code", *({name: _short(sha) for name, sha in facts["sources"].items()} for facts in (then, now)))
    )
    omitted = [f"code: {len(files) - MOST_FILES} more files"] if len(files) > MOST_FILES else []
    return files and [
        *files[:MOST_FILES],
        *omitted,
        *_changes("code", *({"commit": facts["commit"]} for facts in (then, now))),
    ]


def _short(digest: str) -> str:
    return f"sha256 {digest[:12]}…"


def _of_commits(then: str, now: str) -> Iterator[str]:
    """Yields lines on the commits, also on equal ones that may hide changes: uncommitted, or both unknown."""
    yield from _changes("code", {"commit": then}, {"commit": now})
    if then == now == UNKNOWN_COMMIT:
        yield "code commit: not known, because neither ran in a git checkout; it may differ"
    if then == now and now.endswith("-dirty"):
        yield f"code commit: {now} both times, with changes that are not committed and may differ"


def _of_settings(settings: dict[str, tuple[str, str]], resolved: Resolved) -> Iterator[str]:
    """Yields lines on settings given after `run:`, settings newer than the record, and defaults that have changed."""
    for place in walk(resolved.config):
        if isinstance(place.value, dict) or not isinstance(place.node, fdl.Buildable):
            continue
        now = value_text(place)
        then, set_by = settings.get(place.path, ("", ""))
        owner = fdl.get_callable(place.node)
        default = inspect.signature(owner).parameters[place.name].default
        if place.path not in settings:
            yield f"setting {place.path}: not in the record; {now} now, the default"
        elif then != now:
            yield f"setting {place.path}: {then} there, {now} now ({resolved.set_by.get(place.path, '?')})"
        elif set_by.startswith(DEFAULT) and stable_text(default) != then and not place.is_part:
            yield f"default of {owner.__name__}.{place.name}: {then} there, which is kept; {default!r} in today's code"


def differences(resolved: Resolved, facts: dict[str, Any], then: dict[str, Any], config_text: str) -> list[str]:
    """Returns a line per difference in code, versions, layout, data, settings and defaults."""
    return [
        *code_differences(then, facts),
        *_changes("version of", {"python": then.get("python")}, {"python": facts["python"]}),
        *_changes("version of", then.get("versions", {}), facts["versions"]),
        *_changes("layout", _layout(then), _layout(facts)),
        *_changes("data", _hashes(then), _hashes(facts)),
        *_of_settings(read_settings(config_text), resolved),
    ]


def _hashes(facts: dict[str, Any]) -> dict[str, str]:
    return {name: _short(entry["sha256"]) for name, entry in facts.get("inputs", {}).items()}


def _of_user_files(then: dict[str, Any], settings: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Yields a line per user file that has changed since. The run uses the text or the values in the record."""
    for name, recorded in then["user_files"].items():
        path = Path(recorded["path"])
        now = source_hash(path) if path.is_file() else None
        if now == recorded["sha256"]:
            continue
        change = "is gone" if now is None else f"was edited ({_short(recorded['sha256'])} there, {_short(now)} now)"
        effect = "recorded text runs" if f"code of {name}" in settings else "values that it set are in the record"
        yield f"{path} {change}; the {effect}"


def report(resolved: Resolved, facts: dict[str, Any]) -> str:
    """Returns the lines to show before the run starts.

    Raises:
        UsageError: the repeated run has no facts of a start.
    """
    folder = resolved.repeats or Path()
    run = RunFolder(folder)
    if not (then := run.last_facts()):
        raise UsageError(f"{folder}: has no attempts/, so it is not known what it ran on; use config_file: instead.")
    lines = differences(resolved, facts, then, run.settings_text())
    edited = _of_user_files(then, read_settings(run.settings_text()))
    if not lines:
        text = f"repeats {folder} with the same code, versions, layout, data and settings: the same bits are expected"
        return "\n".join([*edited, text])
    if any(line.startswith("code ") for line in lines) and (patch := run.attempts()[-1] / "changes.diff").exists():
        lines.append(f"its changes beyond that commit: {patch}")
    return "\n".join([f"differs from the run it repeats, {folder}:", *(f"  {line}" for line in lines), *edited])


def differences_before(run: RunFolder, resolved: Resolved, facts: dict[str, Any]) -> list[str]:
    """Returns lines for the start of a run: differences from the run that it repeats, and from its own last start."""
    lines = report(resolved, facts).splitlines() if resolved.repeats else []
    with contextlib.suppress(UsageError):  # damaged facts do not stop the run
        if last := run.last_facts():
            lines += [f"resumed with other code: {line}" for line in code_differences(last, facts)]
    return lines
