"""The folder of a run: its frozen record, its attempts, and the paths of everything else in it."""

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd_core.errors import UsageError, escape_unprintable
from kd_core.files import damage_as_usage_error, read_json, read_text, write_json, write_text
from kd_core.json_fields import LARGEST, check_integer, check_object, check_text
from kd_core.parallel.world import World
from kd_core.students.huggingface.save import is_complete_export
from kd_core.training.checkpoints import checkpoint

log = logging.getLogger("kd")
UNKNOWN_COMMIT = "unknown"
NUMBER = re.compile(r"[0-9]{1,9}")
RECORDED_PACKAGES = ("torch", "fiddle", "webdataset", "numpy", "tokenizers", "safetensors", "zstandard")


def read_settings(config_text: str) -> dict[str, tuple[str, str]]:
    """Returns the value and its origin of each setting in a `config.txt`, by the setting's path."""
    settings: dict[str, tuple[str, str]] = {}
    for line in config_text.splitlines():
        path, _, rest = line.partition(" = ")
        value, _, origin = rest.rpartition("  # ")
        settings[path] = (value, origin)
    return settings


def _differences(old_text: str, new_text: str) -> dict[str, str]:
    """Returns the settings whose values differ between two `config.txt`, by path."""
    old, new = ({path: value for path, (value, _) in read_settings(text).items()} for text in (old_text, new_text))
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return {name: f"{old.get(name, 'absent')} there, {new.get(name, 'absent')} now" for name in names}


def _listed(differences: dict[str, str], limit: int = 3) -> str:
    shown = [f"{name} is {values}" for name, values in list(differences.items())[:limit]]
    return "; ".join(shown) + (f"; and {len(differences) - limit} more" if len(differences) > limit else "")


def _visible_text(value: Any, name: str) -> str:
    return escape_unprintable(check_text(value, name))


def _text_or_integer(value: Any, name: str) -> int | str:
    return _visible_text(value, name) if isinstance(value, str) else check_integer(value, name, -LARGEST, LARGEST)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    config.json     the frozen record of the experiment
    config.txt      the same settings as text
    attempts/NNN    the facts and the log of each start
    checkpoints/    complete checkpoints
    export/         the finished student as a Hugging Face folder
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def is_finished(self) -> bool:
        """Checks whether the student, which is written last, is complete. Checkpoints may be deleted then."""
        return is_complete_export(self.export)

    def record(self) -> str:
        """Returns the frozen record of the run, as `claim` wrote it."""
        return read_text(self.path / "config.json", "the record of a run")

    def settings_text(self) -> str:
        """Returns the settings as text, as `claim` wrote them. Raises as `read_text` does."""
        return read_text(self.path / "config.txt", "the settings of a run")

    def last_facts(self) -> dict[str, Any]:
        """Returns those facts of the last start that are shown, or nothing before the first start.

        Raises:
            UsageError: the facts are damaged.
        """
        description = "the facts of a start"
        paths = [path for folder in self.attempts() if (path := folder / "attempt.json").exists()]
        if not paths:
            return {}
        path = paths[-1]
        with damage_as_usage_error(path, description):
            stored = read_json(path, description)
            facts: dict[str, Any] = {
                name: _visible_text(stored[name], name) for name in ("started", "python", "commit")
            }
            facts["versions"] = {
                escape_unprintable(k): _visible_text(v, k)
                for k, v in check_object(stored["versions"], "versions").items()
            }
            facts["world"] = {
                escape_unprintable(k): _text_or_integer(v, k) for k, v in check_object(stored["world"], "world").items()
            }
            facts["sources"] = {
                escape_unprintable(k): _visible_text(v, k)
                for k, v in check_object(stored.get("sources", {}), "sources").items()
            }
            for name, files in (("inputs", stored["inputs"]), ("user_files", stored.get("user_files", {}))):
                facts[name] = {
                    escape_unprintable(role): {key: _visible_text(file[key], key) for key in ("path", "sha256")}
                    for role, file in check_object(files, name).items()
                }
            return facts

    def claim(
        self,
        config_json: str,
        config_text: str,
        may_change: frozenset[str] = frozenset(),
        recorded_text: Callable[[], str] | None = None,
    ) -> dict[str, str]:
        """Writes the record of an experiment, or checks that the folder holds a run of the same one.

        Args:
            config_json: the record.
            config_text: its settings as text.
            may_change: paths of settings that may differ in a resumed run. `steps` may differ too, and with it the
                schedule.
            recorded_text: returns the settings of the folder's record, with today's defaults for settings that are
                newer than it.

        Returns:
            The settings that differ from the record, by path.

        Raises:
            UsageError: the folder belongs to another experiment, or its run has done more steps.
        """
        if not (self.path / "config.json").exists():
            write_text(self.path / "config.txt", config_text)
            write_text(self.path / "config.json", config_json)
            return {}
        if self.record() == config_json:
            if _differences(self.settings_text(), config_text):  # a kill came between the two files
                write_text(self.path / "config.txt", config_text)
            return {}
        differences = _differences(recorded_text() if recorded_text else self.settings_text(), config_text)
        free = ("steps", "schedule") if "steps" in differences else ()
        refused = {name: values for name, values in differences.items()
                   if name not in may_change and name.split(".")[0] not in free}  # fmt: skip
        if refused or not (differences or recorded_text):
            raise UsageError(
                f"{self.path}: holds a run of another experiment ({_listed(refused) or 'its config.json differs'}). "
                "Choose another --run_dir, or the same settings to resume."
            )
        if "steps" in differences:
            self._check_steps(int(read_settings(config_text)["steps"][0]))
        return differences

    def _check_steps(self, steps: int) -> None:
        newest = checkpoint.newest(self.checkpoints)
        if newest is None and self.is_finished:
            raise UsageError(
                f"{self.path}: is finished, and its checkpoints are gone, so it cannot go on to {steps} steps. Start "
                f"another run from its student: student.folder={self.export}."
            )
        if newest is not None and steps < (done := checkpoint.read_progress(newest).step):
            raise UsageError(
                f"steps: got {steps}; {self.path} has done {done}. Set more, or use an earlier student: "
                f"launchers.export_student --student={self.path} --step={steps}, where that checkpoint is kept."
            )

    def change_record(self, attempt: Path, config_json: str, config_text: str) -> None:
        """Replaces the record. The previous one and the student that it produced move to `attempt`/before."""
        before = attempt / "before"
        before.mkdir()
        write_text(before / "config.txt", self.settings_text())
        write_text(before / "config.json", self.record())
        if self.export.exists():  # before the new record, beside which it would look like a finished run
            shutil.move(self.export, before / "export")
        # The record comes first: `claim` rewrites a text that does not fit the record, but never the record.
        write_text(self.path / "config.json", config_json)
        write_text(self.path / "config.txt", config_text)

    def precision(self) -> str | None:
        """Returns the precision that the run began with, or None before it has a record."""
        value = read_run_settings(self).get("parallel.precision")
        return None if value is None else value.strip("'\"")

    def attempts(self) -> list[Path]:
        """Returns the folders of all starts in order, and ignores anything else beside them."""
        return [path for _, path in sorted(self._numbered()) if path.is_dir()]

    def _numbered(self) -> list[tuple[int, Path]]:
        paths = (self.path / "attempts").glob("*")
        return [(int(path.name), path) for path in paths if NUMBER.fullmatch(path.name)]

    def begin_attempt(self, facts: dict[str, Any]) -> Path:
        """Creates `attempts/NNN`, writes the facts of this start there, and directs the log there."""
        folder = self.path / "attempts" / f"{max(self._numbered(), default=(0,))[0] + 1:03d}"
        folder.mkdir(parents=True)
        write_json(folder / "attempt.json", facts)
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        return folder


def read_run_settings(folder: RunFolder) -> dict[str, str]:
    """Returns the values of a run's `config.txt` by path, or nothing before it is written."""
    if not (folder.path / "config.txt").exists():
        return {}
    return {name: value for name, (value, _) in read_settings(folder.settings_text()).items()}


def attempt_facts(world: World, inputs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Returns the facts of this start: command, versions, commit, layout, and path and sha256 of its inputs."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
        "commit": _commit(),
        "world": {"size": world.size, "device": world.device.type, "pid": os.getpid()},
        "inputs": inputs,
    }


def _commit() -> str:
    """Returns the commit of the code, with `-dirty` if the tree differs, or `UNKNOWN_COMMIT` outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # git would find the repository that an installed package happens to lie in
        return UNKNOWN_COMMIT
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN_COMMIT
    return result.stdout.strip() or UNKNOWN_COMMIT


def write_failed_batch(folder: Path, step: int, rank: int, records: list[str], reason: str) -> Path:
    """Writes the names of a rank's records in a step whose loss or gradient was not finite."""
    path = folder / f"failed_step_{step}_rank_{rank}.json"
    write_json(path, {"step": step, "reason": reason, "records": records})
    return path
