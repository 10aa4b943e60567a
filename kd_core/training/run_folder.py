"""The folder of a run: its frozen configuration, its attempts, and where everything else lies in it."""

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

from kd_core.errors import UsageError, visible
from kd_core.files import damaged, read_json, read_text, write_json, write_text
from kd_core.json_fields import LARGEST, fields, integer, text
from kd_core.parallel.world import World
from kd_core.students.huggingface.save import is_whole
from kd_core.training.checkpoints import checkpoint

log = logging.getLogger("kd")
UNKNOWN_COMMIT = "unknown"
NUMBER = re.compile(r"[0-9]{1,9}")
PACKAGES = ("torch", "fiddle", "webdataset", "numpy", "tokenizers", "safetensors", "zstandard")


def read_settings(config_text: str) -> dict[str, tuple[str, str]]:
    """Of a `config.txt`, by path: the value, and who set it."""
    settings: dict[str, tuple[str, str]] = {}
    for line in config_text.splitlines():
        path, _, rest = line.partition(" = ")
        value, _, who = rest.rpartition("  # ")
        settings[path] = (value, who)
    return settings


def _differences(old: str, new: str) -> dict[str, str]:
    """By path, what two `config.txt` say differently."""
    was, wants = ({path: value for path, (value, _) in read_settings(text).items()} for text in (old, new))
    names = [name for name in sorted({*was, *wants}) if was.get(name) != wants.get(name)]
    return {name: f"{was.get(name, 'absent')} there, {wants.get(name, 'absent')} now" for name in names}


def _listed(differences: dict[str, str], most: int = 3) -> str:
    shown = [f"{name} is {how}" for name, how in list(differences.items())[:most]]
    return "; ".join(shown) + (f"; and {len(differences) - most} more" if len(differences) > most else "")


def _words(value: Any, name: str) -> str:
    return visible(text(value, name))


def _fact(value: Any, name: str) -> int | str:
    return _words(value, name) if isinstance(value, str) else integer(value, name, -LARGEST, LARGEST)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where complete checkpoints stand."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The finished student as a Hugging Face folder."""
        return self.path / "export"

    @property
    def is_finished(self) -> bool:
        """Checks whether the run has ended: its student is written last. Its checkpoints may be deleted then."""
        return is_whole(self.export)

    def record(self) -> str:
        """The frozen configuration of the run, as `claim` wrote it."""
        return read_text(self.path / "config.json", "the record of a run")

    def settings_text(self) -> str:
        """The settings as text, as `claim` wrote them; errors as in `read_text`."""
        return read_text(self.path / "config.txt", "the settings of a run")

    def last_facts(self) -> dict[str, Any]:
        """The facts of the last start, of those that are shown; none where there was none.

        Raises:
            UsageError: they are damaged.
        """
        what = "the facts of a start"
        known = [path for folder in self.attempts() if (path := folder / "attempt.json").exists()]
        if not known:
            return {}
        path = known[-1]
        with damaged(path, what):
            value = read_json(path, what)
            facts: dict[str, Any] = {name: _words(value[name], name) for name in ("started", "python", "commit")}
            facts["versions"] = {visible(k): _words(v, k) for k, v in fields(value["versions"], "versions").items()}
            facts["world"] = {visible(k): _fact(v, k) for k, v in fields(value["world"], "world").items()}
            facts["sources"] = {
                visible(k): _words(v, k) for k, v in fields(value.get("sources", {}), "sources").items()
            }
            for name, found in (("inputs", value["inputs"]), ("user_files", value.get("user_files", {}))):
                facts[name] = {
                    visible(where): {key: _words(each[key], key) for key in ("path", "sha256")}
                    for where, each in fields(found, name).items()
                }
            return facts

    def claim(
        self,
        config_json: str,
        config_text: str,
        may_change: frozenset[str] = frozenset(),
        recorded_text: Callable[[], str] | None = None,
    ) -> dict[str, str]:
        """Write the record of the experiment, or check that the folder is of the same one.

        `may_change` are paths of settings that a resumed run may have otherwise; returns those that it has. With them
        it may have other `steps`, and with those another schedule. `recorded_text` gives the settings of the record
        with today's defaults for what is newer than it.

        Raises:
            UsageError: the folder belongs to another experiment, or has done more than the steps.
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
        others = {name: how for name, how in differences.items()
                  if name not in may_change and name.split(".")[0] not in free}  # fmt: skip
        if others or not (differences or recorded_text):
            raise UsageError(
                f"{self.path}: holds a run of another experiment ({_listed(others) or 'its config.json differs'}). "
                "Name another --run_dir, or the same settings to resume."
            )
        if "steps" in differences:
            self._check_steps(int(read_settings(config_text)["steps"][0]))
        return differences

    def _check_steps(self, steps: int) -> None:
        newest = checkpoint.newest(self.checkpoints)
        if newest is None and self.is_finished:
            raise UsageError(
                f"{self.path}: is finished, and its checkpoints are gone, so it cannot go on to {steps} steps. Begin "
                f"another run from its student: student.folder={self.export}."
            )
        if newest is not None and steps < (done := checkpoint.read_progress(newest).step):
            raise UsageError(
                f"steps: got {steps}; {self.path} has done {done}. Give more, or take an earlier student: "
                f"launchers.export_student --student={self.path} --step={steps}, where that checkpoint is kept."
            )

    def change_record(self, attempt: Path, config_json: str, config_text: str) -> None:
        """Write another record; the one before, and the student that was made by it, are kept in `attempt`/before."""
        before = attempt / "before"
        before.mkdir()
        write_text(before / "config.txt", self.settings_text())
        write_text(before / "config.json", self.record())
        if self.export.exists():  # first, for with the new record it would be that of a finished run
            shutil.move(self.export, before / "export")
        # The record first: with its text alone, nothing would tell which of the two the run is of.
        write_text(self.path / "config.json", config_json)
        write_text(self.path / "config.txt", config_text)

    def precision(self) -> str | None:
        """Returns the precision that the run began with. None before it has a record."""
        value = settings_of(self).get("parallel.precision")
        return None if value is None else value.strip("'\"")

    def attempts(self) -> list[Path]:
        """Returns the folders of all starts, in order, whatever else stands among them."""
        return [path for _, path in sorted(self._numbered()) if path.is_dir()]

    def _numbered(self) -> list[tuple[int, Path]]:
        found = (self.path / "attempts").glob("*")
        return [(int(path.name), path) for path in found if NUMBER.fullmatch(path.name)]

    def begin_attempt(self, facts: dict[str, Any]) -> Path:
        """Make `attempts/NNN` with the facts; the log goes there too."""
        folder = self.path / "attempts" / f"{max(self._numbered(), default=(0,))[0] + 1:03d}"
        folder.mkdir(parents=True)
        write_json(folder / "attempt.json", facts)
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        return folder


def settings_of(folder: RunFolder) -> dict[str, str]:
    """The values of a run by path, as its `config.txt` has them; none where it is not written yet."""
    if not (folder.path / "config.txt").exists():
        return {}
    return {name: value for name, (value, _) in read_settings(folder.settings_text()).items()}


def attempt_facts(world: World, inputs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Of this start: command, versions, commit, layout, and path and sha256 of what it reads."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "world": {"size": world.size, "device": world.device.type, "pid": os.getpid()},
        "inputs": inputs,
    }


def _commit() -> str:
    """The commit of the code, with `-dirty` where the tree differs; `UNKNOWN_COMMIT` outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # else a repository around an installed package would be taken for ours
        return UNKNOWN_COMMIT
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN_COMMIT
    return found.stdout.strip() or UNKNOWN_COMMIT


def write_failed_batch(folder: Path, step: int, rank: int, records: list[str], reason: str) -> Path:
    """Leave the names of a rank's records of a step that could not be taken."""
    path = folder / f"failed_step_{step}_rank_{rank}.json"
    write_json(path, {"step": step, "reason": reason, "records": records})
    return path
