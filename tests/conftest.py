"""Shapes in annotations are checked at run time; few threads; a tiny teacher, corpus and caches for all tests."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Kernels are interpreted where no GPU runs them. Triton reads it when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
install_import_hook(["kd_core.losses", "kd_core.students", "data.teacher.scorer"], "beartype.beartype")
torch.set_num_threads(1)

from tests.forks import CORES, bind  # noqa: E402 (after the hook, so that it applies)
from tests.patience import patience  # noqa: E402
from tests.tiny import Tiny, make_tiny  # noqa: E402

# Few tests that take long: handed out last, they would leave all workers but one idle.
STARTS_PROCESSES = ("tests/gpu", "tests/kd_core/parallel", "tests/launchers", "tests/kd_core/losses")
# Seconds of the longest test on an ordinary idle machine, and more.
LONGEST = 100


def pytest_configure(config: pytest.Config) -> None:
    """Bind this process to a core, each of pytest-xdist's workers to its own."""
    if not config.getoption("numprocesses", None):  # of the process that hands out tests
        bind(CORES, int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, and give every test a limit of time that fits this machine.

    A limit of the command line goes before.
    """
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: not item.nodeid.startswith(STARTS_PROCESSES))
    if config.getoption("timeout") is None:
        for item in items:
            own = item.get_closest_marker("timeout")
            seconds = patience(own.args[0] if own else LONGEST)
            item.add_marker(pytest.mark.timeout(seconds), append=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random teacher of 4 layers, 24 short documents, and both caches."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
