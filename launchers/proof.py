"""What every rank of a run goes by, as facts by name, so that ranks can prove to each other that they are alike."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd_core.files import sha256
from kd_core.training.run_folder import PACKAGES

ROOT = Path(__file__).parent.parent
SOURCES = ("kd_core", "data", "experiments", "launchers")


def facts(config_text: str, experiment: Any) -> dict[str, str]:
    """Values of the graph by path, the code by file, versions by package, and all that is read by its hash."""
    lines = (line.split("  # ")[0].split(" = ", 1) for line in config_text.splitlines())
    files = sorted(path for source in SOURCES for path in (ROOT / source).rglob("*.py"))
    return {
        **{f"config {path}": value for path, value in lines},
        **{f"the code of {file.relative_to(ROOT)}": sha256(file) for file in files},
        **{f"the version of {name}": version(name) for name in PACKAGES},
        "the version of python": platform.python_version(),
        **{f"the contents of {read['path']}": read["sha256"] for read in experiment.inputs().values()},
    }
