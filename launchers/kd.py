"""Run a command: `kd train …` is `python -m launchers.train …`, whatever is in the current folder.

kd train --config=quickstart
torchrun --nproc-per-node 2 --no-python kd train --config=quickstart
"""

import ast
import os
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

from experiments.config import catalog
from launchers.cli import app


def commands() -> dict[str, str]:
    """Returns the first docstring line of each command by name. Sources are parsed, so that nothing is imported."""
    summaries: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "\n    app.run_command(" in source:
            summaries[path.stem.replace("_", "-")] = (ast.get_docstring(ast.parse(source)) or "").split("\n", 1)[0]
    return summaries


def _listing() -> str:
    summaries = commands()
    width = max(map(len, summaries))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in summaries.items()]
    return "\n".join(["Usage: kd COMMAND …, kd COMMAND --help. Commands:", *lines])


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1].replace("_", "-") if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help", "-help", "help"):
        app.print_page(_listing() + "\n")
        return
    if name == "--version":
        print(version("kd-workspace"))
        return
    if name not in (summaries := commands()):
        app.exit_with_usage_error("kd", f"no command {sys.argv[1]!r}. {catalog.did_you_mean(name, summaries)}")
    # Processes that a command starts find the packages as this one does, and not in the current folder.
    os.environ["PYTHONSAFEPATH"] = "1"
    app.started_as = "kd"
    module = f"launchers.{name.replace('-', '_')}"
    del sys.argv[1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
