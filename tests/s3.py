"""Servers of the S3 protocol on this machine: hadro checks signatures and has faults, localbucket is written to."""

import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.patience import patience

KEY, SECRET, REGION = "testkey", "Xq7secretXq7", "us-east-1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def use_server(monkeypatch: pytest.MonkeyPatch, port: int, secret: str = SECRET) -> None:
    """Sets the environment as a user of the server would."""
    values = {
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": secret, "AWS_REGION": REGION, "no_proxy": "127.0.0.1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@contextmanager
def _running(module: str, port: int, arguments: list[str]) -> Generator[subprocess.Popen[bytes]]:
    script = Path(sys.executable).with_name(module)
    process = subprocess.Popen(
        [script, "--port", str(port), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + patience(20)
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, f"{module} ended"
            assert time.monotonic() < deadline, f"{module} does not listen"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def hadro(folder: Path, port: int, *faults: str) -> Generator[subprocess.Popen[bytes]]:
    """Serves the subfolders of a folder as buckets, read only."""
    arguments = ["--region", REGION, "--access-key", KEY, "--secret-key", SECRET, *faults, str(folder)]
    with _running("hadro", port, arguments) as process:
        yield process


@contextmanager
def localbucket(folder: Path, port: int) -> Generator[subprocess.Popen[bytes]]:
    """Serves a folder of buckets that can be written."""
    with _running("localbucket", port, [str(folder)]) as process:
        yield process
