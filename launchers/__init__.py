"""The commands: absl apps that turn flags into an experiment graph and run it."""

import importlib.util
from pathlib import Path

_ROOT = Path(__file__).parent.parent
for _name in ("kd_core", "data", "experiments"):
    _spec = importlib.util.find_spec(_name)
    if _spec and _spec.origin and Path(_spec.origin).parent != _ROOT / _name:
        raise SystemExit(
            f"error: {_spec.origin} shadows the package {_name} of {_ROOT}: `python -m` looks into the current folder "
            "first. Start the command as `kd …` (under torchrun: --no-python kd …), with PYTHONSAFEPATH=1, or from "
            "another folder."
        )
