"""A user's own experiment files beside ours."""

import importlib
import sys
from pathlib import Path

import pytest

import experiments
from experiments.config import catalog


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `experiments/` folder with a user's files besides our own."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    for module in {entry.module for entry in catalog.entries()}:
        importlib.import_module(module)  # from their own place, which later tests look for
    for path in catalog.FOLDER.rglob("*.py"):
        copy = folder / path.relative_to(catalog.FOLDER)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    monkeypatch.setattr(catalog, "FOLDER", folder)
    for module in ("experiments.config.user_code", "experiments.config.paths"):
        monkeypatch.setattr(importlib.import_module(module), "FOLDER", folder)
    monkeypatch.setattr(experiments, "__path__", [str(folder)])
    for name in [name for name in sys.modules if name.startswith("experiments.user_")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return folder
