"""Facts about what a rank runs and reads, by name, from which ranks check that they all agree."""

import platform
from importlib.metadata import version
from typing import Any

from experiments.config.code_hashes import source_hashes
from kd_core.training.run_folder import RECORDED_PACKAGES


def collect_facts(config_text: str, experiment: Any) -> dict[str, str]:
    """Returns config values by path, code hashes by file, versions by package, and hashes of all inputs."""
    lines = (line.split("  # ")[0].split(" = ", 1) for line in config_text.splitlines())
    return {
        **{f"config {path}": value for path, value in lines},
        **{f"the code of {path}": digest for path, digest in source_hashes().items()},
        **{f"the version of {name}": version(name) for name in RECORDED_PACKAGES},
        "the version of python": platform.python_version(),
        **{f"the contents of {read['path']}": read["sha256"] for read in experiment.inputs().values()},
    }
