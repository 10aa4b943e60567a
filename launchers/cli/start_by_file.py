"""Restart by module name of a command that was started by its file, as in `python launchers/train.py`.

Python then puts the folder of that file first on the path, where `inspect.py` shadows the standard library's. This
module can therefore import only what needs no `inspect`.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn


def restart_as_module() -> NoReturn:
    """Replaces this process by `python -m launchers.NAME`, which has the project's folder on its path."""
    folder, script = Path(__file__).parents[1], Path(sys.argv[0]).resolve()
    if script.parent != folder.resolve():
        sys.exit(f"error: {folder}/inspect.py shadows the standard library's inspect. Take {folder} off PYTHONPATH.")
    script_index = sys.orig_argv.index(sys.argv[0])
    command = [
        sys.executable,
        *sys.orig_argv[1:script_index],
        "-m",
        f"launchers.{script.stem}",
        *sys.orig_argv[script_index + 1 :],
    ]
    path = os.pathsep.join(filter(None, [str(folder.parent), os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"})  # noqa: S606
