"""Shapes in annotations are checked at run time; few threads; a tiny teacher, corpus and caches for all tests."""

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["kd_core.losses", "kd_core.students", "data.export.teacher"], "beartype.beartype")
torch.set_num_threads(1)

from tests.tiny import Tiny, make_tiny  # noqa: E402 (after the hook, so that it applies)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random teacher of 4 layers, 24 short documents, and both caches."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
