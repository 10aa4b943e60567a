"""What every rank of a run goes by, as facts by name, so that ranks can prove to each other that they are alike."""

import platform
from importlib.metadata import version
from typing import Any

from experiments.config.code_hashes import source_hashes
from kd_core.training.run_folder import RECORDED_PACKAGES


def facts(config_text: str, experiment: Any) -> dict[str, str]:
    """Values of the graph by path, the code by file, versions by package, and all that is read by its hash."""
    lines = (line.split("  # ")[0].split(" = ", 1) for line in config_text.splitlines())
    return {
        **{f"config {path}": value for path, value in lines},
        **{f"the code of {path}": digest for path, digest in source_hashes().items()},
        **{f"the version of {name}": version(name) for name in RECORDED_PACKAGES},
        "the version of python": platform.python_version(),
        **{f"the contents of {read['path']}": read["sha256"] for read in experiment.inputs().values()},
    }
