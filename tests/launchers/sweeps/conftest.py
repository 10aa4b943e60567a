"""A Slurm cluster for a test."""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.forks import ENVIRONMENT
from tests.launchers.sweeps.real_slurm import Cluster, cluster


@pytest.fixture
def start_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[..., Cluster]]:
    """Starts a cluster whose commands are on the PATH of this test."""
    with contextlib.ExitStack() as stack:

        def start(**options: object) -> Cluster:
            made = stack.enter_context(cluster(tmp_path / "slurm", **options))
            for name, value in {**ENVIRONMENT, **made.environment}.items():
                monkeypatch.setenv(name, value)
            return made

        yield start
